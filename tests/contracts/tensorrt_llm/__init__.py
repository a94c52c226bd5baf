"""A stand-in for TensorRT-LLM: the same names, refusals and stream, nothing computed.

Its interface is made from `tests/contracts/trtllm/<version>.json`, which was read from published
sources; the variable SPEEDBENCH_CONTRACT_TRTLLM chooses the version. What is behind
`LLM.generate_async` is a script (see `_engine`).
"""

from ._engine import LLM
from ._models import SamplingParams, version

__version__ = version()
__all__ = ["LLM", "SamplingParams", "__version__"]
