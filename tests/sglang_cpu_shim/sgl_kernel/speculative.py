"""Test only. Where SGLang looks for one of the kernels."""

from sgl_kernel import reconstruct_indices_from_tree_mask

__all__ = ["reconstruct_indices_from_tree_mask"]
