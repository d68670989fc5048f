"""How fast answers come: a bar or plain lines, and a forecast of time and cost from the first 200. Used by the runners."""

import time

from setclip.log import Meter, duration

FORECAST_AFTER = 200
"""Answers from which the forecast is made."""


class Progress:
    """Counts the answers of one call; `started` begins the clock, so that loading a model counts for nothing."""

    def __init__(self, description: str, total: int, answered: int, price_per_hour: float):
        self._description, self._total, self._before, self._price = description, total, answered, price_per_hour
        self._meter: Meter | None = None
        self._answers = self._tokens = 0
        self._begun = 0.0
        self._has_forecast = False

    def started(self) -> None:
        """The engine or server is ready: the clock runs. Again after a restart: it runs on."""
        if self._meter is None:
            self._begun = time.monotonic()
            self._meter = Meter(self._total, self._description, "answers", initial=self._before)

    def answered(self, answers: int = 1, tokens: int = 0) -> None:
        """Counts answers with the tokens of their prompts and texts."""
        self.started()
        assert self._meter is not None
        self._answers += answers
        self._tokens += tokens
        self._meter.update(answers)
        if self._answers >= FORECAST_AFTER:
            self._forecast()

    def close(self) -> None:
        """Ends the bar. A short run says how fast it was."""
        if self._meter is not None:
            if self._answers:
                self._forecast()
            self._meter.close()

    def _forecast(self) -> None:
        if self._has_forecast or self._meter is None:
            return
        self._has_forecast = True
        seconds = max(time.monotonic() - self._begun, 1e-9)
        left = self._total - self._before - self._answers
        rate = self._answers / seconds
        text = (
            f"{self._description}: {self._answers:,} answers in {duration(seconds)}: {rate:,.1f} answers/s, "
            f"{self._tokens / seconds:,.0f} tokens/s"
        )
        if left:
            hours = left / rate / 3600
            text += f"; forecast: {left:,} more in {duration(left / rate)}"
            text += f", cost {hours * self._price:,.2f}" if self._price else ""
        self._meter.print_above(text)
