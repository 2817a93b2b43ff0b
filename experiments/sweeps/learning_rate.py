"""Learning rate and seed of the tiny model: six runs of 20 short steps, far from trained out.

    python experiments/sweep.py experiments/sweeps/learning_rate.py --config experiments/glm5.py:tiny --workers 2

Two CPU cores, no accelerator: at most six minutes. Expected: held-out bits per byte 2.71 and 2.66 before (the seed also
chooses what is held out), and less after 20 steps the higher the rate.
"""

from sweep import product


def sweep():
    """Three learning rates, two seeds each."""
    return product(**{
        "stages.pretrain.learning_rate": [1e-3, 4e-3, 1.6e-2],
        "seed": [0, 1],
        "order": [("pretrain",)],
        "stages.pretrain.seq_len": [256],
        "stages.pretrain.steps": [20],
        "sample.max_new_tokens": [8],
    })
