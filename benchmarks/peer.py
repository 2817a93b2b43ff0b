"""The same weights in transformers on torch: forward, training step, prefill and cached decoding, each as it comes.

transformers scores all keys with its indexer, as this library does, but attends densely under a mask at every length.
"""

import copy
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

import glm5_jax as glm5
from glm5_jax import ModelConfig


class Peer:
    """A model read by `from_pretrained` from what `save_hf` wrote, in float32. torch and transformers load here."""

    def __init__(self, config: ModelConfig, params: Any, threads: int, experts: str | None = None):
        import torch
        import transformers
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch = torch
        chosen = {} if experts is None else {"experts_implementation": experts}
        with tempfile.TemporaryDirectory() as folder:
            directory = pathlib.Path(folder) / "model"
            glm5.save_hf(directory, config, params)
            self.model = transformers.GlmMoeDsaForCausalLM.from_pretrained(
                directory, dtype=torch.float32, **chosen).eval()
        self.implementations = {"attention": self.model.config._attn_implementation,
                                "experts": self.model.config._experts_implementation}
        self.optimizer: Any = None

    def tokens(self, tokens_BT: jax.Array) -> Any:
        return self.torch.from_numpy(np.array(tokens_BT)).long()

    def logits(self, tokens: Any) -> np.ndarray:
        """Float32 [B, T, V]."""
        with self.torch.inference_mode():
            return self.model(tokens, use_cache=False).logits.numpy()

    def prefill(self, tokens: Any) -> tuple[Any, Any]:
        """Logits of the last position [B, 1, V], and the filled cache."""
        with self.torch.inference_mode():
            output = self.model(tokens, use_cache=True, logits_to_keep=1)
        return output.logits, output.past_key_values

    def decode(self, cache: Any, forced: Any) -> Any:
        """The most likely token [B, N] after each of the forced ones, fed one by one."""
        with self.torch.inference_mode():
            return self.torch.cat([self.model(forced[:, i:i + 1], past_key_values=cache, use_cache=True)
                                   .logits.argmax(-1) for i in range(forced.shape[1])], 1)

    def generate(self, tokens: Any, new: int) -> Any:
        """The `new` tokens of a greedy completion of each row, [B, N]."""
        with self.torch.inference_mode():
            whole = self.model.generate(tokens, max_new_tokens=new, min_new_tokens=new, do_sample=False,
                                        attention_mask=self.torch.ones_like(tokens), pad_token_id=0, eos_token_id=None)
        return whole[:, tokens.shape[1]:]

    def copied(self, cache: Any) -> Any:
        """A cache to be filled further."""
        return copy.deepcopy(cache)

    def train_step(self, tokens: Any, learning_rate: float, max_grad_norm: float) -> tuple[float, float]:
        """Forward, backward, clip, fused AdamW; returns the loss and the norm of the gradient before clipping."""
        torch, parameters = self.torch, list(self.model.parameters())
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1,
                                               fused=True)
        logits = self.model.train()(tokens, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.eval()
        return loss.item(), norm.item()
