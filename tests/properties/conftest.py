"""Hypothesis' settings: a few runs a property in the suite, the same each time; thousands of others in a campaign."""

import torch
from hypothesis import HealthCheck, register_random, settings

common = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("suite", max_examples=12, stateful_step_count=8, derandomize=True, **common)
settings.register_profile("campaign", max_examples=1000, stateful_step_count=12, **common)
settings.load_profile("suite")


class TorchRandom:
    """Torch's generator with the methods by which hypothesis seeds a generator and puts it back."""

    seed, getstate, setstate = map(staticmethod, (torch.manual_seed, torch.get_rng_state, torch.set_rng_state))


TORCH_RANDOM = TorchRandom()  # hypothesis refers to it weakly
register_random(TORCH_RANDOM)
