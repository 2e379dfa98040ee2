"""What a run is judged by: the loss on held-out text, and the loss on what was said before."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

REPEATED = 4  # batches that are said twice: the moment when heads learn to copy needs no more to be seen


def said_twice(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first half of each block twice, and labels of what the second saying lets foresee.

    Shapes: (b, n) -> two of (b, 2·(n // 2)). The second saying's first token is not to be foreseen.
    """
    half = x.shape[1] // 2
    twice = x[:, :half].repeat(1, 2)
    labels = twice.clone()
    labels[:, : half + 1] = -100
    return twice, labels


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator) -> dict[str, float]:
    """Return the mean next-token loss over the validation set, and that on the second saying of a part of it.

    The labels are shifted once, by the model. Heads that copy make the second loss small; a run whose second loss has
    not fallen is too short to compare optimizers by its first.
    """
    model.eval()
    losses: dict[str, list[Tensor]] = {"val/loss": [], "val/copy_loss": []}
    for k, x in enumerate(loader):
        tasks = {"val/loss": (x, x)} | ({"val/copy_loss": said_twice(x)} if k < REPEATED and x.shape[1] > 3 else {})
        for name, (text, labels) in tasks.items():
            loss = model(input_ids=text, labels=labels).loss
            losses[name].append(accelerator.gather_for_metrics(loss.repeat(len(x))))
    model.train()
    return {name: torch.cat(values).mean().item() for name, values in losses.items() if values}
