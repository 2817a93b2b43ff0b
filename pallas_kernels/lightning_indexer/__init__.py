"""The lightning indexer of DeepSeek Sparse Attention: index scores and the exact selection of keys."""
