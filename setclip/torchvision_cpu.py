"""Lets torchvision import where its compiled extension cannot load (a CUDA wheel beside a CPU build of torch).

The one place of this work-around. torchvision 0.28 registers fake kernels for two operators of its extension while it
is imported; without the extension the operators do not exist and the import fails with "operator torchvision::nms does
not exist". Declaring their schemas is enough for transforms, models and datasets; `torchvision.ops.nms` and
`torchvision.io` stay unavailable. Declaring them and *then* loading a working extension aborts the process, so the
extension is tried first and nothing is declared where it loads (every GPU machine).

`install()` is called by `setclip/__init__.py`. It imports neither torch nor torchvision: it waits until somebody does.
"""

import importlib.machinery
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from pathlib import Path

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library = None  # a torch.library.Library undeclares its schemas when it is collected


class _BeforeTorchvision(MetaPathFinder):
    """Finds nothing; runs `declare_missing_operators` once, just before torchvision is first imported."""

    def find_spec(self, fullname, path=None, target=None):
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec("torchvision")
            if spec is not None and spec.submodule_search_locations:
                declare_missing_operators(Path(spec.submodule_search_locations[0]))
        return


def install() -> None:
    """Arranges that the operators are declared, if need be, when torchvision is imported. Does nothing twice."""
    if "torchvision" not in sys.modules and not any(isinstance(f, _BeforeTorchvision) for f in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())


def declare_missing_operators(torchvision_dir: Path) -> bool:
    """Declares the two schemas if the extension in `torchvision_dir` cannot load; returns whether it declared them."""
    global _library
    import torch  # here, because importing setclip must not import torch

    suffixes = (*importlib.machinery.EXTENSION_SUFFIXES, ".so", ".pyd", ".dylib")
    candidates = (torchvision_dir / f"_C{suffix}" for suffix in suffixes)
    extension = next((path for path in candidates if path.exists()), None)
    if extension is not None:
        try:
            torch.ops.load_library(str(extension))
            return False
        except OSError:
            pass
    if _library is None:
        _library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in _SCHEMAS:
            _library.define(schema)
    return True
