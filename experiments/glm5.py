"""GLM-5 from raw text to a sparse, instructed model that has learned from rewards, in six stages: the main job.

    python -m glm5_jax --config experiments/glm5.py:tiny

tiny   0.8M parameters, 300 kB of Python documentation and seeded problems. Two CPU cores, no accelerator: ten minutes
       of processor time, compilation included. The table to expect is in the README.
small  100M parameters on the Python standard library, 90M tokens: one accelerator. Not measured yet.
glm5   the released sizes and token counts, values only: 744B parameters do not fit a single machine.

Options follow the name after a comma: tiny,data=stdlib trains on the Python standard library, data=packaged on the text
that comes with the package, data=PATH on a folder of text files or a JSONL file.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("tiny", "small", "glm5")
ORDER = ("pretrain", "midtrain", "dsa_warmup", "dsa_sparse", "sft")
CHAINS, TOOLS, TALK = ("sums", "products", "turns"), ("lookup", "python"), ("courtesy",)  # skills


def get_config(arg: str = "tiny") -> ConfigDict:
    """The values of `arg`, one of ARGUMENTS; `,data=` and a source may follow."""
    name, *options = arg.split(",")
    if name not in ARGUMENTS:
        raise ValueError(f"experiments/glm5.py: expected one of {', '.join(ARGUMENTS)}, found {name!r}")
    for option in options:
        if not option.startswith("data="):
            raise ValueError(f"experiments/glm5.py: expected the option data=..., found {option!r}")
    source = options[-1].removeprefix("data=") if options else "packaged" if name == "tiny" else "stdlib"
    common = dict(
        model=dict(preset=name, overrides=dict(num_hidden_layers=2, initializer_range=0.08) if name == "tiny" else {}),
        held_out_fraction=0.1 if source == "packaged" else 0.02,
        order=ORDER,
        sample=dict(prompt="The \"return\" statement", max_new_tokens=80, temperature=0.8),
        seed=0,
        compilation_cache="auto",
    )
    return ConfigDict(common | {"tiny": _tiny, "small": _small, "glm5": _glm5}[name](source))


def _stage(kind: str, source: str, steps: int, seq_len: int, batch_size: int, rope_theta: float, learning_rate: float,
           final_learning_rate: float, warmup_steps: int = 0, keep: bool = False) -> dict:
    return dict(kind=kind, source=source, steps=steps, seq_len=seq_len, batch_size=batch_size, rope_theta=rope_theta,
                learning_rate=learning_rate, final_learning_rate=final_learning_rate, warmup_steps=warmup_steps,
                keep=keep)


def _rl_stage(kind: str, skills: tuple[str, ...], steps: int, groups: int, size: int, learning_rate: float,
              bound: int = 0, save_every: int = 5) -> dict:
    return dict(kind=kind, skills=skills, steps=steps, groups=groups, size=size, learning_rate=learning_rate, beta=2.0,
                clip_low=0.2, clip_high=0.28, bound=bound, save_every=save_every)


def _tiny(source: str) -> dict:
    return dict(
        optimizer=dict(name="muon_split", weight_decay=0.1, b1=0.9, b2=0.95),
        train=dict(log_every=10, mtp_steps=1, mtp_weight=0.3, balance_weight=1e-4, indexer_weight=1.0,
                   router_bias_rate=1e-2, max_grad_norm=1.0, loss_chunk=0, micro_batches=1),
        stages=dict(
            pretrain=_stage("pretrain", source, 80, 512, 4, 1e4, 1e-2, 4e-3, warmup_steps=10),
            midtrain=_stage("midtrain", source, 16, 1024, 2, 5e4, 4e-3, 1e-3, keep=True),
            dsa_warmup=_stage("dsa_warmup", source, 24, 1024, 2, 5e4, 2.5e-2, 5e-3),
            dsa_sparse=_stage("dsa_sparse", source, 12, 1024, 2, 5e4, 2e-3, 2e-3),
            sft=_stage("sft", "demonstrations", 320, 256, 8, 5e4, 5e-3, 5e-4, warmup_steps=10)),
        checkpoint=dict(every=80, keep=2),
        rl=dict(
            slots=64, max_len=128, length=256, rows=8, demonstrations=1500, well=0.4, problems=200, held_out=64,
            level=5, hops=1, flaky=0.05, tensorboard=False,
            optimizer=dict(name="adamw", weight_decay=0.0, b1=0.9, b2=0.95),
            order=("reasoning_rl",),
            stages=dict(
                reasoning_rl=_rl_stage("reasoning", CHAINS, 20, 24, 8, 4e-4),
                agentic_rl=_rl_stage("agentic", TOOLS, 10, 16, 8, 4e-4, bound=2),
                general_rl=_rl_stage("general", TALK, 10, 16, 8, 4e-4),
                distillation=_rl_stage("distillation", CHAINS + TOOLS + TALK, 10, 192, 1, 4e-4))))


def _small(source: str) -> dict:
    return dict(
        optimizer=dict(name="muon_split", weight_decay=0.1, b1=0.9, b2=0.95),
        train=dict(log_every=10, mtp_steps=3, mtp_weight=0.3, balance_weight=1e-4, indexer_weight=1.0,
                   router_bias_rate=1e-3, max_grad_norm=1.0, loss_chunk=512, micro_batches=1),
        stages=dict(
            pretrain=_stage("pretrain", source, 2000, 2048, 16, 1e6, 6e-4, 1.2e-4, warmup_steps=100),
            midtrain=_stage("midtrain", source, 200, 8192, 4, 4e6, 1.2e-4, 6e-5, keep=True),
            dsa_warmup=_stage("dsa_warmup", source, 200, 8192, 4, 4e6, 5e-3, 2e-4),
            dsa_sparse=_stage("dsa_sparse", source, 200, 8192, 4, 4e6, 6e-5, 6e-5),
            sft=_stage("sft", "demonstrations", 300, 2048, 16, 4e6, 6e-5, 6e-6, warmup_steps=10)),
        checkpoint=dict(every=250, keep=2),
        rl=dict(
            slots=256, max_len=512, length=2048, rows=8, demonstrations=1500, well=0.4, problems=500, held_out=200,
            level=9, hops=3, flaky=0.01, tensorboard=False,
            optimizer=dict(name="adamw", weight_decay=0.0, b1=0.9, b2=0.95),
            order=("reasoning_rl", "agentic_rl", "general_rl", "distillation"),
            stages=dict(
                reasoning_rl=_rl_stage("reasoning", CHAINS, 100, 32, 16, 1e-5),
                agentic_rl=_rl_stage("agentic", TOOLS, 100, 32, 16, 1e-5, bound=4),
                general_rl=_rl_stage("general", TALK, 50, 32, 16, 1e-5),
                distillation=_rl_stage("distillation", CHAINS + TOOLS + TALK, 50, 512, 1, 1e-5))))


def _glm5(source: str) -> dict:
    """Tokens as published: 27T at 4K, 1T at 32K, 500B at 128K, 50B at 200K, 2.84B for the indexer alone, 20B sparse."""
    return dict(
        optimizer=dict(name="muon_split", weight_decay=0.1, b1=0.9, b2=0.95),
        train=dict(log_every=10, mtp_steps=3, mtp_weight=0.3, balance_weight=1e-4, indexer_weight=1.0,
                   router_bias_rate=1e-3, max_grad_norm=1.0, loss_chunk=512, micro_batches=1),
        order=("pretrain", "midtrain_32k", "midtrain_128k", "midtrain_200k", "dsa_warmup", "dsa_sparse", "sft"),
        stages=dict(
            pretrain=_stage("pretrain", source, 412_000, 4096, 16_000, 1e4, 2e-4, 4e-5, warmup_steps=2000),
            midtrain_32k=_stage("midtrain", source, 15_000, 32_768, 2000, 1e6, 4e-5, 2e-5, keep=True),
            midtrain_128k=_stage("midtrain", source, 7_600, 131_072, 500, 1e6, 2e-5, 1.1e-5, keep=True),
            midtrain_200k=_stage("midtrain", source, 770, 202_752, 320, 1e6, 1.1e-5, 1e-5, keep=True),
            dsa_warmup=_stage("dsa_warmup", source, 1000, 202_752, 14, 1e6, 5e-3, 2e-4),
            dsa_sparse=_stage("dsa_sparse", source, 308, 202_752, 320, 1e6, 1e-5, 1e-5),
            sft=_stage("sft", "demonstrations", 1000, 202_752, 64, 1e6, 1e-5, 1e-6)),
        checkpoint=dict(every=1000, keep=2),
        rl=dict(
            slots=1024, max_len=202_752, length=202_752, rows=64, demonstrations=5000, well=0.4, problems=5000,
            held_out=500, level=9, hops=3, flaky=0.0, tensorboard=False,
            optimizer=dict(name="adamw", weight_decay=0.1, b1=0.9, b2=0.98),
            order=("reasoning_rl", "agentic_rl", "general_rl", "distillation"),
            stages=dict(
                reasoning_rl=_rl_stage("reasoning", CHAINS, 1000, 32, 32, 1e-6),
                agentic_rl=_rl_stage("agentic", TOOLS, 1000, 32, 32, 1e-6, bound=4),
                general_rl=_rl_stage("general", TALK, 500, 32, 32, 1e-6),
                distillation=_rl_stage("distillation", CHAINS + TOOLS + TALK, 100, 1024, 1, 1e-6))))
