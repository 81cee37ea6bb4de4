"""Any model of `transformers`, made of its config: `[model] use = "hf:FOLDER"`.

The config is read once, when the run begins, and kept in the run; weights, if the folder has some, are what it begins with. From
then on both are in the run, so the folder may go. Nothing is ever fetched from a hub.

The price of any model is that it comes as it is: names and shapes are its own, so tensor parallelism and pipelines, which must
know them, are refused. Blocks, which are sharded and compiled one by one, are those that the model itself does not split.
"""

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any, cast

import orjson
import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode

from datastore.errors import ConfigError, DependencyError, MissingError
from datastore.training.models.cache import KeyValueCache, RoundedCache
from datastore.training.models.gpt import GPT, Block

__all__ = [
    "FOREIGN",
    "Continuation",
    "blocks_of",
    "build",
    "logits_of",
    "open_folder",
    "positions_of",
    "read_architecture",
    "units_of",
    "weights_in",
    "write_model",
]

FOREIGN = "hf:"
"""What `model.use` begins with, if it is a model of `transformers`."""

_FORMS = {
    "ForCausalLM": "causal",
    "LMHeadModel": "causal",
    "ForMaskedLM": "masked",
    "ForSequenceClassification": "classes",
}
"""What the name of an architecture ends with, and which form of a model that is."""

_CLASSES = {
    "causal": "AutoModelForCausalLM",
    "masked": "AutoModelForMaskedLM",
    "classes": "AutoModelForSequenceClassification",
}


def read_architecture(use: str) -> dict[str, Any]:
    """Return the config of the model that `use` names: `hf:FOLDER`, or `hf:FILE`.

    Raises:
        ConfigError: it is no such name, or what is there is no config.
        MissingError: there is no config.
    """
    if not use.startswith(FOREIGN):
        raise ConfigError("no such model", use=use, hint='Write model.use = "hf:FOLDER", or leave it out for our GPT.')
    path = Path(use.removeprefix(FOREIGN))
    file = path / "config.json" if path.is_dir() else path
    try:
        found = orjson.loads(file.read_bytes())
    except FileNotFoundError:
        raise MissingError(
            "there is no config of a model", file=str(file), hint="Name a folder on this machine: nothing is fetched."
        ) from None
    except ValueError as error:
        raise ConfigError(f"not a config: {error}", file=str(file), hint="Name a folder with a config.json.") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise ConfigError("not a config of transformers", file=str(file), hint="It must have a model_type.")
    return found


def build(architecture: Mapping[str, Any], *, form: str, options: Mapping[str, Any], seed: int) -> nn.Module:
    """Return the model of a config with weights that `seed` gives, on the CPU in float32; `options` change the config.

    Raises:
        DependencyError: transformers is not installed.
        ConfigError: it knows no such model, or none of this form.
    """
    kind = _class_of(form)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model: nn.Module = kind.from_config(_config(architecture, options), dtype=torch.float32)
        except (ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"transformers cannot make this model: {str(error).splitlines()[0]}",
                model_type=architecture.get("model_type"),
                form=form,
                hint="Look at its config.json, or choose another objective.",
            ) from error
        if form != "classes":
            _learn_every_id(model)
        if form == "causal" and detect_fake_mode() is None and _looks_ahead(model.eval()):
            raise ConfigError(
                "this model sees the tokens that it is to predict",
                model_type=architecture.get("model_type"),
                hint='Set "is_decoder": true in its config.json, or set objective.use = "masked".',
            )
    return model.train()


@torch.no_grad()
def _learn_every_id(model: nn.Module) -> None:
    """Let the embedding of `pad_token_id` learn as any other does: a dataset of tokens has no padding, and that id is one of its own.

    torch keeps that row from learning, and transformers begins it as zeros (OLMo2 names 1, Gemma 0, if a config is silent).
    """
    table = cast("Any", model).get_input_embeddings()
    if isinstance(table, nn.Embedding) and table.padding_idx is not None:
        config: Any = model.config
        table.weight[table.padding_idx].normal_(std=getattr(config, "initializer_range", 0.02))
        table.padding_idx = None


def positions_of(model: nn.Module) -> int | None:
    """Return how many tokens a text may have, where the model learns a vector for each place; None: as many as you like."""
    tables = [
        table.num_embeddings - getattr(table, "offset", 0) - (0 if table.padding_idx is None else table.padding_idx + 1)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and (name.endswith("wpe") or "position" in name.rpartition(".")[2])
        if "vision" not in name
    ]
    return min(tables, default=None)


@torch.no_grad()
def _looks_ahead(model: nn.Module) -> bool:
    """Return whether the last of some tokens changes what comes out before it: two short passes, little beside drawing the weights."""
    ids = torch.zeros((1, 4), dtype=torch.int64)
    other = ids.clone()
    other[0, -1] = 1
    try:
        before, after = (logits_of(model, one)[0, :-1] for one in (ids, other))
    except RuntimeError as error:
        raise ConfigError(
            f"a pass through this model fails: {str(error).splitlines()[0]}",
            model=type(model).__name__,
            hint="Look at its config.json: numbers of heads must fit one another, those of keys and values (num_key_value_heads), too.",
        ) from error
    return bool((before - after).abs().max() > 1e-5 * before.abs().max())  # Experts group tokens anew, and round.


def weights_in(use: str, *, form: str, options: Mapping[str, Any], seed: int) -> dict[str, Tensor] | None:
    """Return the weights in the folder that `use` names, in float32; None if it has none.

    What the objective needs and the folder lacks, such as the layer that tells classes, is drawn from `seed`.
    """
    path = Path(use.removeprefix(FOREIGN))
    if not path.is_dir() or not any(one.suffix in {".safetensors", ".bin"} for one in path.iterdir()):
        return None
    kind = _class_of(form)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = _config(read_architecture(use), options)
        model = kind.from_pretrained(path, config=config, dtype=torch.float32, local_files_only=True)
    return dict(model.state_dict())


def write_model(model: nn.Module, folder: Path) -> list[Path]:
    """Write `model` to the local `folder` as `from_pretrained` reads it; return the files."""
    save: Any = model.save_pretrained
    save(folder)
    return sorted(one for one in folder.iterdir() if one.is_file())


def logits_of(model: nn.Module, ids: Tensor, *, present: Tensor | None = None) -> Tensor:
    """Return the logits of our model or of one of `transformers`, which wraps them; `present` is its `attention_mask`."""
    found = model(ids) if present is None else model(ids, attention_mask=present)
    return found if isinstance(found, Tensor) else found.logits


class Continuation:
    """A causal model that goes on with a text: it is fed what is new, where it can keep what it has seen, and else all of it.

    With `rounded` our GPT keeps it as integers of 8 bits; a model of `transformers` refuses that with a ConfigError.
    """

    def __init__(self, model: nn.Module, *, rounded: bool = False) -> None:
        if rounded and not isinstance(model, GPT):
            raise ConfigError(
                "only our GPT keeps keys and values as integers", model=type(model).__name__, hint="Set `cache_bits=0`."
            )
        self._model = model
        kept = RoundedCache() if rounded else KeyValueCache()
        self._kept: Any = kept if isinstance(model, GPT) else None
        self._seen = torch.empty((1, 0), dtype=torch.int64)
        known = signature(model.forward).parameters
        # transformers 5.24 warns of the old name, which is to go.
        self._name = "cache" if "cache" in known else "past_key_values"

    def __call__(self, ids: Tensor) -> Tensor:
        """Return the logits [V] of the token behind `ids` [1, T], which follow those that were given before."""
        if isinstance(self._kept, KeyValueCache):
            return self._model(ids, self._kept)[0, -1]  # type: ignore[no-any-return]
        if self._kept is None:
            ids = self._seen = torch.cat((self._seen, ids), dim=1)
            found = self._model(ids, use_cache=True)
        else:
            found = self._model(ids, **{self._name: self._kept}, use_cache=True)
        self._kept = getattr(found, self._name, None)
        return found.logits[0, -1]  # type: ignore[no-any-return]


def open_folder(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return the model that `transformers` opens in a folder, in float32, and its config.

    Raises:
        ConfigError: it opens none there, or none of a kind that is known here.
        DependencyError: transformers is not installed.
    """
    config = read_architecture(f"{FOREIGN}{folder}")
    named = " ".join(config.get("architectures") or ())
    form = next((form for part, form in _FORMS.items() if part in named), None)
    if form is None:
        raise ConfigError(
            "not a kind of model that is used here",
            folder=str(folder),
            architectures=named,
            hint="There must be a language model, a masked one, or a classifier of texts.",
        )
    try:
        model = _class_of(form).from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"transformers cannot open this model: {str(error).splitlines()[0]}",
            folder=str(folder),
            hint="Look at its config.json, and at its files.",
        ) from error
    return model.eval(), config


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model, in order: ours, or the modules that a model of `transformers` wants to keep whole."""
    whole = tuple(getattr(model, "_no_split_modules", None) or ())
    return [one for one in model.modules() if isinstance(one, Block) or type(one).__name__ in whole]


def units_of(model: nn.Module) -> list[list[nn.Module]]:
    """Return the blocks of a model in order, those together that follow each other and have a parameter in common."""
    units: list[list[nn.Module]] = []
    before: set[int] = set()
    for block in blocks_of(model):
        own = {id(one) for one in block.parameters()}
        if own & before:
            units[-1].append(block)
        else:
            units.append([block])
            before = set()
        before |= own
    return units


def _class_of(form: str) -> Any:
    try:
        import transformers  # noqa: PLC0415 - optional, and takes seconds
    except ModuleNotFoundError as error:
        raise DependencyError(
            "models of transformers need an extra",
            missing=error.name,
            hint="Install it: pip install 'llm-datastore[hf]'.",
        ) from None
    return getattr(transformers, _CLASSES[form])


def _config(architecture: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    from transformers import AutoConfig  # noqa: PLC0415 - as above

    table = {key: value for key, value in architecture.items() if key != "model_type"}
    try:
        config = AutoConfig.for_model(architecture["model_type"], **table)
    except ValueError as error:
        raise ConfigError(
            f"transformers does not know this model: {str(error).splitlines()[0]}",
            model_type=architecture["model_type"],
            hint="Install a version of transformers that does.",
        ) from None
    for key, value in {"use_cache": False, **options}.items():
        setattr(config, key, value)
    return config
