"""What tells one model from another: a digest of its weights and of how pictures reach it.

Used by bulk export and search, whose files live longer than the checkpoint that made them.
"""

import hashlib
import json
from typing import Any

import torch

from setclip.checkpoint import LoadedModel


def model_identity(loaded: LoadedModel) -> dict[str, Any]:
    """Returns the identity of the model with its "fingerprint", 64 hex digits.

    Equal fingerprints mean equal embeddings: weights, architecture name, picture size, mean and standard deviation. The
    place and the step do not count, so a run that was moved stays the same model and one that was trained on does not.
    """
    digest = hashlib.sha256()
    pictures = [loaded.identity.get("model"), loaded.image_size, list(loaded.mean), list(loaded.std)]
    digest.update(json.dumps(pictures).encode())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()))
    return {**loaded.identity, "fingerprint": digest.hexdigest()}


def model_words(identity: dict[str, Any]) -> str:
    """Returns a model for a message: its place and the beginning of its fingerprint."""
    return f"{identity.get('where', 'a model')} (fingerprint {str(identity.get('fingerprint'))[:12]}…)"
