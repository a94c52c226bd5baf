"""AutoDeploy's constructor arguments."""

from ..._models import AutoDeployLlmArgs as LlmArgs

__all__ = ["LlmArgs"]
