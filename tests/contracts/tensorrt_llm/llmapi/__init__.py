"""The configuration classes this version has, and no other."""

from .._engine import RequestError
from .._models import LLMAPI

globals().update(LLMAPI)
__all__ = ["RequestError", *LLMAPI]
