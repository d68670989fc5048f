"""What a runner is given: requests without answers, and where the answers go."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.llm.config import RunnerConfig
from data_prep.llm.jsonl import Request, read_records, request_line
from data_prep.llm.progress import Progress
from setclip.files import replacing

REQUESTS_NAME = "requests.jsonl"
ANSWERS_NAME = "answers.jsonl"
LOG_NAME = "engine.log"


@dataclass(frozen=True)
class Job:
    """The requests of one call that have no answer yet."""

    requests: Sequence[Request]
    folder: Path
    config: RunnerConfig
    progress: Progress
    lock: int
    """File descriptor that holds the folder's lock; a process that writes answers keeps it open."""

    @property
    def answers(self) -> Path:
        """The file that grows."""
        return self.folder / ANSWERS_NAME

    @property
    def log(self) -> Path:
        """What the engine prints."""
        return self.folder / LOG_NAME

    def finished(self) -> set[str]:
        """Returns the ids that have an answer by now."""
        return {record["custom_id"] for record in read_records(self.answers)}

    def write_requests(self, requests: Sequence[Request], path: Path) -> None:
        """Writes requests as a batch file."""
        with replacing(path) as temporary, open(temporary, "wb") as file:
            file.writelines(request_line(request, self.config) for request in requests)
