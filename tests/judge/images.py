"""Images in the form that a model asks for, and the tokens that stand for them in its text."""

import inspect
from weakref import WeakKeyDictionary

import torch
from torch import nn

TOKEN = 1  # which no text of the judge has
NAMES = ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id", "media_token_id")
FORMS = WeakKeyDictionary()  # of a model: how it is given images, and how many tokens an image is


def images_of(model, ids, targets, draw):
    """Return what a model is called with: text and its targets, and images with their tokens in front of the text.

    Args:
        model: The model.
        ids: The tokens of the text.
        targets: The tokens to predict.
        draw: The generator of the pixels.
    """
    if model not in FORMS:
        FORMS[model] = _form_that_runs(model)
    return _given(model, ids, targets, draw, *FORMS[model])


def form_name(model):
    """Return what the model calls its images; None for a model of text."""
    asked = inspect.signature(model.forward).parameters
    return next((name for name in ("pixel_values", "flattened_patches") if name in asked), None)


def is_given_images(model):
    """Tell whether a model was given images: whether it asks for any, in a form that the judge knows."""
    return bool(FORMS.get(model, (None,))[0])


def _given(model, ids, targets, draw, shape, more, count):
    """Return the inputs of one form: images of that shape, and the number of tokens that one image is."""
    asked = inspect.signature(model.forward).parameters
    ids = torch.cat([ids.new_full((len(ids), count), TOKEN), ids], 1)
    if not model.config.is_encoder_decoder:
        targets = torch.cat([targets.new_full((len(targets), count, *targets.shape[2:]), -100), targets], 1)
    given = {"input_ids": ids, "labels": targets}
    if count:
        given |= {name: (ids == TOKEN).long() for name in ("token_type_ids", "mm_token_type_ids") if name in asked}
    if shape:
        given |= {form_name(model): torch.randn(shape, generator=draw, dtype=torch.float64)} | more
    return given


def _form_that_runs(model):
    """Return (shape of the images, more inputs, tokens of an image) of the first form with which the model runs."""
    if form_name(model) is None:
        return None, {}, 0
    for owner in (owner for module in model.modules() for owner in (module, getattr(module, "config", None))):
        for name in NAMES:
            if isinstance(vars(owner or object).get(name, ""), int | None):
                setattr(owner, name, TOKEN)
    ids = torch.full((2, 4), 3)
    for shape, more in _forms(model):
        try:
            with torch.no_grad():
                count = _tokens_of(model, _given(model, ids, ids, torch.Generator().manual_seed(0), shape, more, 0))
                model(**_given(model, ids, ids, torch.Generator().manual_seed(0), shape, more, count))
        except Exception:  # what one of 90 models says to images in the form of another
            continue
        return shape, more, count
    return None, {}, 0


def _tokens_of(model, given):
    """Return how many tokens an image is, by what the model makes of two."""
    if not hasattr(model, "get_image_features"):
        return 0
    inner = getattr(model, "model", model)
    asked = {
        n
        for m in (model, inner)
        if hasattr(m, "get_image_features")
        for n in inspect.signature(m.get_image_features).parameters
    }
    names = [name for name in given if name in asked and name not in ("input_ids", "labels")]
    found = model.get_image_features(**{name: given[name] for name in names})
    found = getattr(found, "pooler_output", found)
    parts = [found] if isinstance(found, torch.Tensor) else found
    return sum(part.numel() // part.shape[-1] for part in parts) // 2


def _forms(model):
    """Yield (shape, more inputs) of two images: patches in rows, or planes of colours, whole or in tiles."""
    asked = inspect.signature(model.forward).parameters
    config = next((c for c in map(model.config.__dict__.get, ("vision_config", "vision_tower_config")) if c), None)
    config = config or model.config
    filters = [m for m in model.modules() if isinstance(m, nn.modules.conv._ConvNd)]
    size, patch = (_number(config, *names) for names in (("image_size", "img_size"), ("patch_size",)))
    colours = _number(config, "num_channels", "in_channels", "in_chans") or 3
    entries = filters[0].weight[0].numel() if filters else colours * (patch or 1) ** 2
    if "spatial_shapes" in asked:
        shapes = {"spatial_shapes": torch.tensor([[4, 4]] * 2), "pixel_attention_mask": torch.ones(2, 16).long()}
        yield (2, 16, entries), shapes
        yield (2, 16, colours * (patch or 1) ** 2), shapes
    for name in {"image_grid_thw", "image_grid_hw"} & {*asked}:
        grid = {name: torch.tensor([[1, 4, 4]] * 2)[:, name.endswith("_hw") :]}
        grid |= {"image_merge_sizes": torch.tensor([2, 2])} if "image_merge_sizes" in asked else {}
        yield (32, entries), grid
        yield (32, colours * (patch or 1) ** 2), grid
        yield (32, colours, patch or 1, patch or 1), grid
    for side in filter(None, dict.fromkeys((size, 32, 64))):
        sizes = [{"image_sizes": torch.tensor([[side, side]] * 2)}] * ("image_sizes" in asked)
        for tiles in ((), (1,), (2,)):
            yield from (((2, *tiles, colours, side, side), more) for more in (*sizes, {}))


def _number(config, *names):
    """Return the first of these fields that is a number."""
    values = (getattr(config, name, None) for name in names)
    values = (value[0] if isinstance(value, list | tuple) and value else value for value in values)
    return next((value for value in values if isinstance(value, int)), None)


def in_another_basis(images, basis):
    """Return images with the entries of every patch in another basis.

    Args:
        images: Patches in rows, or planes of colours.
        basis: An orthogonal matrix over the entries of a patch.
    """
    if images.shape[-1] == len(basis):
        return images @ basis.T
    side = round((len(basis) / images.shape[-3]) ** 0.5)
    planes = images.flatten(0, -4) if images.ndim > 3 else images[None]
    patches = nn.functional.unfold(planes, side, stride=side)
    return nn.functional.fold(basis @ patches, planes.shape[-2:], side, stride=side).view_as(images)
