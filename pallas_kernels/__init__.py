"""Kernels of DeepSeek Sparse Attention and of mixtures of experts: exact, differentiable, for TPU, GPU and CPU."""

from pallas_kernels.dispatch import IMPLEMENTATIONS, Choice, explain
from pallas_kernels.lightning_indexer.api import index_scores, select_topk
from pallas_kernels.moe_dispatch.api import grouped_matmul
from pallas_kernels.moe_dispatch.expert_parallel import expert_parallel
from pallas_kernels.sparse_mla.api import sparse_mla, sparse_mla_decode

__all__ = ["IMPLEMENTATIONS", "Choice", "expert_parallel", "explain", "grouped_matmul", "index_scores", "select_topk",
           "sparse_mla", "sparse_mla_decode"]
