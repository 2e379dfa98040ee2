"""A model in float64 with weights that matter, its loss, and its weights replaced for a while."""

import inspect
import re
from contextlib import contextmanager
from unittest import mock

import torch
from torch import nn

from judge.images import form_name, images_of, in_another_basis


@contextmanager
def in_double():
    """Let nothing leave float64: models cast norms, softmaxes and logits to fp32."""
    to, float_ = torch.Tensor.to, torch.Tensor.float
    softmax = nn.functional.softmax

    def stays(self, *args, **kwargs):
        narrow = [x for x in (*args, *kwargs.values()) if x in (torch.float32, torch.bfloat16, torch.float16)]
        if self.dtype == torch.float64 and narrow:
            args = tuple(torch.float64 if x in narrow else x for x in args)
            kwargs = {key: torch.float64 if x in narrow else x for key, x in kwargs.items()}
        return to(self, *args, **kwargs)

    def soft(x, dim=None, _stacklevel=3, dtype=None):
        return softmax(x, dim=dim, dtype=None if x.dtype == torch.float64 else dtype)

    cast = torch.Tensor.type

    def keeps(self, dtype=None, **kwargs):
        return self if self.dtype == torch.float64 and dtype == torch.float32 else cast(self, dtype, **kwargs)

    with (
        mock.patch.object(torch.Tensor, "to", stays),
        mock.patch.object(torch.Tensor, "type", keeps),
        mock.patch.object(torch.Tensor, "float", lambda x: x if x.dtype == torch.float64 else float_(x)),
        mock.patch.object(nn.functional, "softmax", soft),
        mock.patch.object(torch, "softmax", lambda x, dim, dtype=None: soft(x, dim)),
    ):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(default)


def loud(model, seed=0):
    """Make every weight matter, in float64: fresh matrices of RMS 0.3, vectors near their values."""
    torch.manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1 and p.is_floating_point():
                p.copy_(0.3 * torch.randn_like(p))
            elif p.is_floating_point():
                p.add_(0.2 * torch.randn_like(p))
    return model


def inputs_of(model, length=12, seed=1, names=None, labels=None, pixels=None):
    """Return what the model is called with: tokens, and images, states or masks for what tokens alone do not reach."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config.get_text_config()
    books = getattr(config, "num_codebooks", 0) * hasattr(model, "lm_heads")  # of Musicgen, [rows · books, length]
    ids = torch.randint(3, config.vocab_size, (2 * max(books, 1), length), generator=draw)
    if model.config.is_encoder_decoder and getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = 0
    asked = inspect.signature(model.forward).parameters
    inputs, targets = (ids if order is None else order[ids] for order in (names, labels))
    targets = targets.view(2, books, length).mT if books else targets
    given = images_of(model, inputs, targets, draw)
    if pixels is not None:
        given[form_name(model)] = in_another_basis(given[form_name(model)], pixels)
    if hasattr(config, "use_cache"):
        given["use_cache"] = False
    if "encoder_hidden_states" in asked and (width := _width_of_states(model)):
        given["encoder_hidden_states"] = torch.randn(2, 5, width, generator=draw, dtype=torch.float64)
    if "global_attention_mask" in asked:
        given["global_attention_mask"] = (torch.arange(length) % 5 == 0).long().expand(2, -1)
    return given


def _width_of_states(model):
    """Return the width of what a cross-attention reads in a decoder alone; None without one."""
    layers = [m for n, m in model.named_modules() if CROSS.search(n) and isinstance(m, nn.Linear)]
    return layers[0].in_features if layers and not model.config.is_encoder_decoder else None


def reads_given_states(name, model):
    """Tell whether a parameter reads states that the judge makes up, whose coordinates nothing else knows."""
    return (
        bool(CROSS.search(name))
        and not re.search(r"(q|query|o|out|dense)(_proj)?\.\w+$", name)
        and not (model.config.is_encoder_decoder)
    )


CROSS = re.compile(r"(encoder_attn|cross_?attention|EncDecAttention|cross_attn)\..*k", re.IGNORECASE)


def loss_of(model, length=12, **names):
    """Return the loss of one batch; tokens, labels and pixels may have other names."""
    with torch.no_grad(), in_double():
        return model(**inputs_of(model, length, **names)).loss.double().item()


def gradients(model, seed):
    """Return {name: gradient of the loss of one batch}, where it is not zero."""
    wanted = tensors_of(model)
    before = {name: p.requires_grad for name, p in wanted.items()}
    for p in wanted.values():
        p.requires_grad_(True)
    with torch.enable_grad(), in_double():
        loss = model(**inputs_of(model, seed=seed)).loss
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    for name, p in wanted.items():
        p.requires_grad_(before[name])
    return {name: g for name, g in zip(wanted, found, strict=True) if g is not None and g.norm() > 0}


def tensors_of(model):
    """Return {name: tensor} of all parameters, and of buffers that hold tables of fixed numbers."""
    buffers = {name: b for name, b in model.named_buffers() if b.is_floating_point() and b.ndim > 1}
    return dict(model.named_parameters()) | buffers


@contextmanager
def replaced(model, moved):
    """Put moved values in place for a while."""
    parameters = tensors_of(model)
    before = {name: parameters[name].detach().clone() for name in moved}
    with torch.no_grad():
        for name, value in moved.items():
            parameters[name].copy_(value)
        yield
        for name, value in before.items():
            parameters[name].copy_(value)


@contextmanager
def renamed_rows(weight, order):
    """Look every row of one table up under another number for a while."""
    look_up = nn.functional.embedding

    def renamed(ids, table, *args, **kwargs):
        return look_up(order[ids] if table is weight else ids, table, *args, **kwargs)

    with mock.patch.object(nn.functional, "embedding", renamed):
        yield
