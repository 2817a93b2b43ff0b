"""The whole model once more: slow, plain NumPy in float64, one row at a time, from checkpoint tensors by their names.

Written from the equations of the architecture, not from the library: it shares no line with it, and reads the released
layout ([out, in], heads folded). T query positions, S = T key positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import glm5_jax as glm5

MICRO = glm5.ModelConfig(
    vocab_size=64, hidden_size=16, num_hidden_layers=3, intermediate_size=24, moe_intermediate_size=8,
    n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=1, num_attention_heads=2, q_lora_rank=12,
    kv_lora_rank=8, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=8, index_n_heads=2, index_head_dim=8,
    index_topk=5, rope_theta=1e4, dtype="float32", remat="none")
# Every option that changes the equations, at sizes that are nowhere equal by accident.
RICH = MICRO.replace(
    num_hidden_layers=5, mlp_layer_types=("dense", "sparse", "sparse", "dense", "sparse"),
    indexer_types=("full", "shared", "full", "shared", "shared"), n_routed_experts=6, num_experts_per_tok=3, n_group=3,
    topk_group=2, n_shared_experts=2, norm_topk_prob=False, routed_scaling_factor=1.5, num_attention_heads=3,
    v_head_dim=5, index_n_heads=3, index_head_dim=10, attention_bias=True, tie_word_embeddings=True,
    latent_norm_eps=1e-3, rms_norm_eps=1e-4)


def random_params(config: glm5.ModelConfig, seed: int = 0) -> Any:
    """Parameters without zeros and ones, so that a forgotten scale or bias shows."""
    rng = np.random.default_rng(seed)

    def leaf(spec: Any) -> jax.Array:
        noise = rng.normal(size=spec.shape)
        value = {"normal": 0.3 * noise, "zeros": 0.3 * noise, "ones": 1 + 0.3 * noise}[spec.init]
        return jnp.asarray(value, spec.dtype)

    return jax.tree.map(leaf, glm5.param_specs(config), is_leaf=lambda x: hasattr(x, "axes"))


def rms_norm(x, scale, eps):
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def layer_norm(x, scale, offset, eps=1e-6):
    x = x - x.mean(-1, keepdims=True)
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) + offset


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(x, mask):
    """Over the last axis where the mask holds; zeros where nothing is left."""
    top = np.where(mask, x, -np.inf).max(-1, keepdims=True)
    weights = np.exp(np.where(mask, x - np.where(mask.any(-1, keepdims=True), top, 0), -np.inf))
    return weights / np.where(mask.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)


def rotate(x, positions, theta):
    """x [T, ..., C]: the pair (2i, 2i+1) turns by position * theta^(-2i/C)."""
    x = np.array(x)
    for t, position in enumerate(positions):
        for i in range(x.shape[-1] // 2):
            angle = position * theta ** (-2 * i / x.shape[-1])
            even, odd = x[t, ..., 2 * i].copy(), x[t, ..., 2 * i + 1].copy()
            x[t, ..., 2 * i] = even * np.cos(angle) - odd * np.sin(angle)
            x[t, ..., 2 * i + 1] = even * np.sin(angle) + odd * np.cos(angle)
    return x


def select(scores, visible, top_k):
    """The selection contract for one query: the indices, ascending."""
    candidates = [s for s in range(len(scores)) if visible[s] and not np.isnan(scores[s])]
    return sorted(sorted(candidates, key=lambda s: (-(scores[s] + 0.0), s))[:top_k])


def visibility(positions, segments):
    t, s = np.indices((len(positions), len(positions)))
    return (segments[t] == segments[s]) & (segments[s] != 0) & (positions[s] <= positions[t])


class Row:
    """The model over one row of tokens. `found` gathers what the library can be asked to collect."""

    def __init__(self, config, tensors, tokens, positions, segments, indexer_loss=None):
        self.config, self.tokens, self.positions, self.segments = config, tokens, positions, segments
        self.tensors = {name: np.asarray(value, np.float64) for name, value in tensors.items()}
        self.indexer_loss = indexer_loss
        self.scores = self.selected = None
        self.found: dict[str, Any] = {}
        self.forward()

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, x, name):
        return x @ self[name + ".weight"].T + self.tensors.get(name + ".bias", 0)

    def forward(self):
        c = self.config
        x = self["model.embed_tokens.weight"][self.tokens]
        for i in range(c.num_hidden_layers):
            self.found[f"hidden/{i}"] = x
            x = self.layer(x, i, self.segments)
        self.hidden = self.found["hidden/final_norm"] = rms_norm(x, self["model.norm.weight"], c.rms_norm_eps)
        self.logits = self.unembed(self.hidden)

    def unembed(self, hidden):
        return hidden @ self["model.embed_tokens.weight" if self.config.tie_word_embeddings else "lm_head.weight"].T

    def mtp(self, steps):
        """[(known [T], hidden [T, D], kl)] of each step."""
        c, prefix, h, out = self.config, f"model.layers.{self.config.num_hidden_layers}.", self.hidden, []
        for k in range(1, steps + 1):
            known = np.array([t + k < len(h) and self.segments[t + k] == self.segments[t] != 0 for t in range(len(h))])
            ahead = self["model.embed_tokens.weight"][np.roll(self.tokens, -k)]
            z = np.concatenate([rms_norm(ahead, self[prefix + "enorm.weight"], c.rms_norm_eps),
                                rms_norm(h, self[prefix + "hnorm.weight"], c.rms_norm_eps)], -1)
            z = z @ self[prefix + "eh_proj.weight"].T
            z = self.layer(z, c.num_hidden_layers, np.where(known, self.segments, 0))
            h = rms_norm(z, self[prefix + "shared_head.norm.weight"], c.rms_norm_eps)
            out.append((known, h, self.found.get(f"indexer_kl/{c.num_hidden_layers}")))
        return out

    def layer(self, x, i, segments):
        prefix, eps = f"model.layers.{i}.", self.config.rms_norm_eps
        x = x + self.attention(rms_norm(x, self[prefix + "input_layernorm.weight"], eps), i, segments)
        u = rms_norm(x, self[prefix + "post_attention_layernorm.weight"], eps)
        dense = prefix + "mlp.gate_proj.weight" in self.tensors
        return x + (self.mlp(u, prefix + "mlp.") if dense else self.moe(u, i, segments))

    def attention(self, u, i, segments):
        c, prefix, length = self.config, f"model.layers.{i}.self_attn.", len(u)
        heads, nope, rank = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
        query_latent = rms_norm(self.linear(u, prefix + "q_a_proj"), self[prefix + "q_a_layernorm.weight"],
                                c.latent_norm_eps)
        q = self.linear(query_latent, prefix + "q_b_proj").reshape(length, heads, -1)
        row = self.linear(u, prefix + "kv_a_proj_with_mqa")
        latent = rms_norm(row[:, :rank], self[prefix + "kv_a_layernorm.weight"], c.latent_norm_eps)
        kv = self.linear(latent, prefix + "kv_b_proj").reshape(length, heads, -1)
        q_rope = rotate(q[..., nope:], self.positions, c.rope_theta)
        k_rope = rotate(row[:, rank:], self.positions, c.rope_theta)

        visible = visibility(self.positions, segments)
        if prefix + "indexer.wk.weight" in self.tensors:
            self.scores = self.index(u, query_latent, prefix + "indexer.")
            self.selected = [select(self.scores[t], visible[t], c.index_topk) for t in range(length)]
            self.found[f"index_scores/{i}"] = np.where(visible, self.scores, -np.inf)
        chosen = np.full((length, min(c.index_topk, length)), -1)
        mask = np.zeros((length, length), bool)
        for t, keys in enumerate(self.selected):
            chosen[t, :len(keys)] = keys
            mask[t, keys] = True
        self.found[f"selected/{i}"] = chosen
        mask = visible if self.indexer_loss == "dense" else mask

        p = np.zeros((heads, length, length))
        mixed = np.zeros((length, heads, c.v_head_dim))
        for h in range(heads):
            logits = q[:, h, :nope] @ kv[:, h, :nope].T + q_rope[:, h] @ k_rope.T
            p[h] = softmax(logits / np.sqrt(nope + c.qk_rope_head_dim), mask)
            mixed[:, h] = p[h] @ kv[:, h, nope:]
        self.found[f"attention/{i}"] = p.mean(0)
        if self.indexer_loss:
            target, guess = p.mean(0), softmax(self.scores, mask)
            terms = np.zeros_like(target)
            terms[target > 0] = target[target > 0] * np.log(target[target > 0] / guess[target > 0])
            self.found[f"indexer_kl/{i}"] = terms.sum(-1), segments != 0
        return self.linear(mixed.reshape(length, -1), prefix + "o_proj")

    def index(self, u, query_latent, prefix):
        c, rope = self.config, self.config.qk_rope_head_dim
        q = self.linear(query_latent, prefix + "wq_b").reshape(len(u), c.index_n_heads, c.index_head_dim)
        k = layer_norm(u @ self[prefix + "wk.weight"].T, self[prefix + "k_norm.weight"], self[prefix + "k_norm.bias"])
        q = np.concatenate([rotate(q[..., :rope], self.positions, c.rope_theta), q[..., rope:]], -1)
        k = np.concatenate([rotate(k[..., :rope], self.positions, c.rope_theta), k[..., rope:]], -1)
        weights = self.linear(u, prefix + "weights_proj") / np.sqrt(c.index_n_heads)
        scores = np.zeros((len(u), len(u)))
        for j in range(c.index_n_heads):
            scores += weights[:, j, None] * np.maximum(q[:, j] @ k.T / np.sqrt(c.index_head_dim), 0)
        return scores

    def mlp(self, u, prefix):
        return self.linear(silu(self.linear(u, prefix + "gate_proj")) * self.linear(u, prefix + "up_proj"),
                           prefix + "down_proj")

    def moe(self, u, i, segments):
        c, prefix = self.config, f"model.layers.{i}.mlp."
        scores = 1 / (1 + np.exp(-self.linear(u, prefix + "gate")))
        choice = scores + self[prefix + "gate.e_score_correction_bias"]
        out, experts, weights = self.mlp(u, prefix + "shared_experts."), [], []
        for t in range(len(u)):
            mine = route(choice[t], c.num_experts_per_tok, c.n_group, c.topk_group)
            w = scores[t, mine]
            w = c.routed_scaling_factor * (w / w.sum() if c.norm_topk_prob else w)
            for e, weight in zip(mine, w):
                out[t] += weight * self.mlp(u[t], f"{prefix}experts.{e}.")
            experts.append(mine)
            weights.append(w)
        real = segments != 0
        load = np.bincount(np.array(experts)[real].reshape(-1), minlength=c.n_routed_experts)
        frequency = c.n_routed_experts * load / (c.num_experts_per_tok * max(real.sum(), 1))
        share = (scores / scores.sum(-1, keepdims=True))[real].mean(0) if real.any() else 0 * load
        self.found |= {f"router/{i}/experts": np.array(experts), f"router/{i}/weights": np.array(weights),
                       f"load/{i}": load, f"balance/{i}": (frequency * share).sum()}
        return out


def route(choice, active, groups, keep):
    """Expert indices of one token by preference; of equal choices the lowest index."""
    by_choice = lambda values: sorted(range(len(values)), key=lambda e: (-values[e], e))
    size = len(choice) // groups
    members = [range(g * size, (g + 1) * size) for g in range(groups)]
    sums = [sum(sorted(choice[list(m)])[-2:]) for m in members] if groups > 1 else [0.0]
    allowed = {e for g in by_choice(sums)[:keep] for e in members[g]}
    return [e for e in by_choice(choice) if e in allowed][:active]


def default_positions(segments):
    """How many earlier tokens of the row have the same segment id, [B, T]."""
    return np.array([[(row[:t] == row[t]).sum() for t in range(len(row))] for row in segments])


def rows(config, tensors, tokens, *, segments=None, positions=None, indexer_loss=None) -> list[Row]:
    """The model over every row of tokens [B, T]."""
    segments = np.ones(tokens.shape, int) if segments is None else segments
    positions = default_positions(segments) if positions is None else positions
    return [Row(config, tensors, *each, indexer_loss) for each in zip(tokens, positions, segments)]
