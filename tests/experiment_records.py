"""Records of experiments, as `experiments.sweep` writes them."""


def record(label, seed, loss, **parts):
    speed = parts.pop("speed", 1000.0)
    return {
        "label": label,
        "seed": seed,
        "key": f"{label} {seed}",
        "loss": {"prose": loss},
        "account": {"total": 2_000_000},
        "settings": {"train.steps": 500},
        "measured": {"tokens_per_second": speed},
    } | parts
