"""AutoDeploy's LLM."""

from ..._engine import AutoDeployLLM

LLM = AutoDeployLLM
__all__ = ["LLM"]
