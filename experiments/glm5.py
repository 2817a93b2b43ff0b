"""GLM-5 pre-training on one text: the main job.

    python -m glm5_jax --config experiments/glm5.py:tiny

tiny   1M parameters, 300 kB of Python documentation, 306k tokens. Two CPU cores, no accelerator: about two minutes of
       training beside half a minute of compilation (the first time). Expected: held-out bits per byte 2.71 before,
       1.87 after; busiest expert 1.2 times the mean load.
small  100M parameters on the Python standard library, 65M tokens: one accelerator. Not measured yet.
glm5   the released sizes, values only: 744B parameters do not fit a single machine.

Options follow the name after a comma: tiny,data=stdlib trains on the Python standard library, data=packaged on the text
that comes with the package.
"""

from ml_collections import ConfigDict

ARGUMENTS = ("tiny", "small", "glm5")
OPTIONS = ("data=packaged", "data=stdlib")


def get_config(arg: str = "tiny") -> ConfigDict:
    """The values of `arg`, one of ARGUMENTS; any of OPTIONS may follow, each after a comma."""
    name, *options = arg.split(",")
    if name not in ARGUMENTS:
        raise ValueError(f"experiments/glm5.py: expected one of {', '.join(ARGUMENTS)}, found {name!r}")
    for option in options:
        if option not in OPTIONS:
            raise ValueError(f"experiments/glm5.py: expected an option of {', '.join(OPTIONS)}, found {option!r}")
    config = ConfigDict(dict(
        model=dict(preset=name, overrides={}),
        data=dict(source="packaged", seq_len=512, batch_size=4, held_out_fraction=0.1),
        optimizer=dict(name="adamw", learning_rate=4e-3, final_learning_rate=4e-4, warmup_steps=10,
                       weight_decay=0.1, b1=0.9, b2=0.95),
        train=dict(steps=150, dense_steps=50, log_every=10, mtp_steps=1, mtp_weight=0.3, balance_weight=1e-4,
                   indexer_weight=1.0, router_bias_rate=1e-2, max_grad_norm=1.0, loss_chunk=0,
                   micro_batches=1),
        checkpoint=dict(every=30, keep=2),
        sample=dict(prompt="The \"return\" statement", max_new_tokens=80, temperature=0.8),
        seed=0,
        compilation_cache="auto",
    ))
    if name == "small":
        config.data.update(source="stdlib", seq_len=2048, batch_size=16)
        config.optimizer.update(learning_rate=6e-4, final_learning_rate=6e-5, warmup_steps=100)
        config.train.update(steps=2000, dense_steps=500, mtp_steps=3, router_bias_rate=1e-3)
        config.checkpoint.update(every=250)
    if name == "glm5":
        config.data.update(source="stdlib", seq_len=4096, batch_size=1024)
        config.optimizer.update(name="muon_split", learning_rate=2e-4, final_learning_rate=2e-5, warmup_steps=2000)
        config.train.update(steps=100_000, dense_steps=0, mtp_steps=3, router_bias_rate=1e-3, loss_chunk=512)
        config.checkpoint.update(every=1000)
    for option in options:
        config.data.source = option.removeprefix("data=")
    if config.data.source == "stdlib":
        config.data.held_out_fraction = 0.02
    return config
