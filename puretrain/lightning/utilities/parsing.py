"""Reading arguments: from text, from the frame of an ``__init__``, into hyper-parameters.

What a LightningModule and a LightningDataModule do with hyper-parameters is here, as functions of
the object: :func:`save_hyperparameters`, :func:`set_hyperparameters`, :func:`hyperparameters`.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import types
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

from torch import nn

from puretrain.lightning.utilities.distributed import rank_zero_warn
from puretrain.lightning.utilities.exceptions import MisconfigurationException

__all__ = [
    "AttributeDict",
    "clean_namespace",
    "collect_init_args",
    "flatten_dict",
    "get_init_args",
    "hyperparameters",
    "initial_hyperparameters",
    "is_picklable",
    "lightning_getattr",
    "lightning_hasattr",
    "lightning_setattr",
    "parse_class_init_keys",
    "save_hyperparameters",
    "set_hyperparameters",
    "str_to_bool",
    "str_to_bool_or_int",
    "str_to_bool_or_str",
]

_PRIMITIVES = (bool, int, float, str)


class AttributeDict(dict[str, Any]):
    """A dictionary whose entries are attributes as well.

    >>> settings = AttributeDict(rate=0.1, layers=2)
    >>> settings.rate
    0.1
    >>> settings.width = 8
    >>> settings["width"]
    8
    >>> settings
    "layers": 2
    "rate":   0.1
    "width":  8
    """

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f'Missing attribute "{key}"') from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        try:
            del self[key]
        except KeyError:
            raise AttributeError(f'Missing attribute "{key}"') from None

    def __reduce__(self) -> tuple[Any, ...]:
        # torch's weights-only unpickler makes objects of known classes, but does not fill them
        return type(self), (dict(self),)

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0) + 3
        lines = (f'"{key}":'.ljust(width) + f" {self[key]}" for key in sorted(self, key=str))
        return "\n".join(lines)


# ── Text ──────────────────────────────────────────────────────────────────────────────────────────

_TRUE = ("y", "yes", "t", "true", "on", "1")
_FALSE = ("n", "no", "f", "false", "off", "0")


def str_to_bool_or_str(val: Any) -> bool | str | Any:
    """A bool if the text is a spelling of one, else the text.

    >>> str_to_bool_or_str("YES"), str_to_bool_or_str("off"), str_to_bool_or_str("maybe")
    (True, False, 'maybe')
    """
    lower = str(val).lower()
    if lower in _TRUE:
        return True
    return False if lower in _FALSE else val


def str_to_bool(val: Any) -> bool:
    """The bool that a text spells.

    >>> str_to_bool("on")
    True

    Raises:
        ValueError: it spells none.
    """
    value = str_to_bool_or_str(val)
    if isinstance(value, bool):
        return value
    raise ValueError(f"invalid truth value {value}")


def str_to_bool_or_int(val: Any) -> bool | int | str | Any:
    """A bool or a whole number if the text is a spelling of one, else the text.

    >>> str_to_bool_or_int("false"), str_to_bool_or_int("12"), str_to_bool_or_int("a")
    (False, 12, 'a')
    """
    value = str_to_bool_or_str(val)
    if isinstance(value, bool):
        return value
    try:
        return int(value)
    except ValueError:
        return value


# ── Pickling ──────────────────────────────────────────────────────────────────────────────────────


def is_picklable(obj: object) -> bool:
    """Whether an object can be pickled, and so be saved or sent to another process.

    >>> is_picklable(1), is_picklable(lambda: 1)
    (True, False)
    """
    try:
        pickle.dumps(obj)
    except (pickle.PickleError, AttributeError, TypeError, RuntimeError):
        return False
    return True


def clean_namespace(hparams: Namespace | MutableMapping[str, Any]) -> None:
    """Delete the values that can't be pickled, with a warning for each."""
    values = hparams.__dict__ if isinstance(hparams, Namespace) else hparams
    for key in [key for key, value in values.items() if not is_picklable(value)]:
        rank_zero_warn(f"attribute '{key}' removed from hparams because it cannot be pickled")
        del values[key]


def flatten_dict(source: Mapping[str, Any], result: dict[str, Any] | None = None) -> dict[str, Any]:
    """Put the entries of inner dictionaries into one, under their own keys.

    >>> flatten_dict({"a": 1, "b": {"c": 2}})
    {'a': 1, 'c': 2}
    """
    result = {} if result is None else result
    for key, value in source.items():
        if isinstance(value, dict):
            flatten_dict(value, result)
        else:
            result[key] = value
    return result


# ── Arguments of an __init__ ──────────────────────────────────────────────────────────────────────


def parse_class_init_keys(cls: type) -> tuple[str, str | None, str | None]:
    """The names that an ``__init__`` gives to itself, its ``*args`` and its ``**kwargs``.

    >>> class Model:
    ...     def __init__(this, width, *more, **options): ...
    >>> parse_class_init_keys(Model)
    ('this', 'more', 'options')
    """
    parameters = list(inspect.signature(cls.__init__).parameters.values())

    def named(kind: Any) -> str | None:
        return next((p.name for p in parameters if p.kind is kind), None)

    return (
        parameters[0].name,
        named(inspect.Parameter.VAR_POSITIONAL),
        named(inspect.Parameter.VAR_KEYWORD),
    )


def _code_of_init(cls: type) -> types.CodeType | None:
    init = cls.__dict__.get("__init__")
    return getattr(inspect.unwrap(init), "__code__", None) if init is not None else None


def _object_and_class(frame: types.FrameType) -> tuple[Any, type] | None:
    """The object whose ``__init__`` runs in a frame, and the class that the ``__init__`` is of."""
    code = frame.f_code
    if not code.co_argcount and not code.co_flags & inspect.CO_VARARGS:
        return None
    names = code.co_varnames[:1]
    obj = frame.f_locals.get(names[0]) if names else None
    if obj is None:
        return None
    for cls in type(obj).__mro__:
        if _code_of_init(cls) is code:
            return obj, cls
    return None


def get_init_args(frame: types.FrameType) -> dict[str, Any]:
    """The arguments of the ``__init__`` that runs in a frame; nothing if none does.

    Those of ``**kwargs`` count one by one, those of ``*args`` not at all.
    """
    found = _object_and_class(frame)
    if found is None:
        return {}
    code, local = frame.f_code, frame.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    names = code.co_varnames[1:count] if code.co_argcount else code.co_varnames[:count]
    arguments = {name: local[name] for name in names if name in local}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        place = count + bool(code.co_flags & inspect.CO_VARARGS)
        arguments |= local.get(code.co_varnames[place], {})
    return arguments


def _init_frames(frame: types.FrameType | None, obj: Any) -> Iterator[types.FrameType]:
    """The frames from one outwards that are an ``__init__`` of an object."""
    while frame is not None:
        found = _object_and_class(frame)
        if found is not None and found[0] is obj:
            yield frame
        frame = frame.f_back


def collect_init_args(
    frame: types.FrameType,
    path_args: list[dict[str, Any]] | None = None,
    inside: bool = False,
    classes: tuple[type, ...] = (),
) -> list[dict[str, Any]]:
    """The arguments of each ``__init__`` of one object, from a frame outwards.

    Args:
        frame: where to begin; it may itself be no ``__init__``.
        path_args: what was found before.
        inside: not used; accepted because programs pass it.
        classes: only objects of these classes count.

    Returns:
        First the innermost class's, last those of the class that was called.
    """
    result = list(path_args or [])
    current: types.FrameType | None = frame
    while current is not None:
        found = _object_and_class(current)
        if found is not None and (not classes or isinstance(found[0], classes)):
            result.extend(get_init_args(each) for each in _init_frames(current, found[0]))
            break
        current = current.f_back
    return result


# ── Hyper-parameters of a module or a data module ─────────────────────────────────────────────────


def hyperparameters(obj: Any) -> AttributeDict | MutableMapping[str, Any]:
    """The hyper-parameters of an object, empty at first; changing them changes the object's."""
    if "_hparams" not in obj.__dict__:
        obj._hparams = AttributeDict()
    return obj.__dict__["_hparams"]


def initial_hyperparameters(obj: Any) -> AttributeDict:
    """A copy of the hyper-parameters as they were saved first."""
    return copy.deepcopy(obj.__dict__.get("_hparams_initial", AttributeDict()))


def set_hyperparameters(obj: Any, hparams: Any) -> None:
    """Add hyper-parameters to those of an object.

    Args:
        obj: a module or a data module.
        hparams: a dictionary, a Namespace, or any other mapping, which stays of its type.

    Raises:
        ValueError: it is a single number or text, or of a type that has no names.
    """
    if isinstance(hparams, Namespace):
        hparams = vars(hparams)
    if isinstance(hparams, dict):
        hparams = AttributeDict(hparams)
    elif isinstance(hparams, _PRIMITIVES):
        raise ValueError(f"Primitives {_PRIMITIVES} are not allowed.")  # noqa: TRY004 - as in 1.x
    elif not isinstance(hparams, Mapping):
        raise ValueError(f"Unsupported config type of {type(hparams)}.")  # noqa: TRY004 - as in 1.x
    if isinstance(hparams, dict) and isinstance(hyperparameters(obj), dict):
        hyperparameters(obj).update(hparams)
    else:
        obj._hparams = hparams


def assign_hyperparameters(obj: Any, hparams: Any) -> None:
    """What ``self.hparams = hparams`` does, an older spelling of ``save_hyperparameters``."""
    obj._hparams_name = _name_of(obj, hparams, inspect.currentframe())
    set_hyperparameters(obj, hparams)
    if "_hparams_initial" not in obj.__dict__:
        obj._hparams_initial = _copied(hyperparameters(obj))


def _name_of(obj: Any, value: Any, frame: types.FrameType | None) -> str | None:
    """The name of the ``__init__`` argument that is a value."""
    for each in _init_frames(frame, obj):
        for name, argument in get_init_args(each).items():
            if argument is value:
                return name
    return None


def _copied(hparams: Any) -> Any:
    """A deep copy, in which what can't be copied is itself."""
    try:
        return copy.deepcopy(hparams)
    except Exception:  # noqa: BLE001 - any class may refuse, in its own way
        if not isinstance(hparams, dict):
            return copy.copy(hparams)
        return type(hparams)({key: _copied_value(value) for key, value in hparams.items()})


def _copied_value(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:  # noqa: BLE001 - any class may refuse, in its own way
        return value


def save_hyperparameters(
    obj: Any,
    *args: Any,
    ignore: Sequence[str] | str | None = None,
    frame: types.FrameType | None = None,
    given: Mapping[str, Any] | None = None,
) -> None:
    """Keep the arguments of the running ``__init__`` as hyper-parameters of its object.

    Args:
        obj: a module or a data module.
        *args: by default all arguments are kept, those of subclasses included; names keep only
            these; a single dictionary, Namespace or other mapping is kept as it is.
        ignore: a name or names to leave out.
        frame: of the ``__init__``; by default that of the caller.
        given: more arguments, which count before those of the frame.

    Raises:
        MisconfigurationException: a name is no argument, or there are several mappings.
    """
    if len(args) == 1 and not isinstance(args[0], str) and not args[0]:
        return
    if frame is None:
        current = inspect.currentframe()
        frame = current.f_back if current is not None else None
    if dataclasses.is_dataclass(obj) and not isinstance(obj, type):
        arguments = {
            field.name: getattr(obj, field.name)
            for field in dataclasses.fields(obj)
            if hasattr(obj, field.name)
        }
    else:
        arguments = {}
        for each in _init_frames(frame, obj):
            arguments |= get_init_args(each)
    arguments |= given or {}
    ignored = {ignore} if isinstance(ignore, str) else set(_names(ignore))
    arguments = {name: value for name, value in arguments.items() if name not in ignored}
    obj._hparams_name, hparams = _chosen(args, arguments, ignored)
    if hparams:
        _warn_of_modules(hparams)
        set_hyperparameters(obj, hparams)
    # a deep copy, so that changes made later show as a difference
    obj._hparams_initial = _copied(hyperparameters(obj))


def _names(ignore: Iterable[Any] | None) -> list[str]:
    return [name for name in ignore or () if isinstance(name, str)]


def _chosen(
    args: tuple[Any, ...], arguments: dict[str, Any], ignored: set[str]
) -> tuple[str | None, Any]:
    """The name under which to hand hyper-parameters to ``__init__``, and they themselves."""
    if not args:
        return ("kwargs" if arguments else None), arguments
    mappings = [arg for arg in args if not isinstance(arg, str)]
    if len(mappings) > 1:
        raise MisconfigurationException(
            "save_hyperparameters takes names of arguments, or one dictionary or Namespace; "
            f"got {len(mappings)} arguments that are no names"
        )
    if mappings:
        (hparams,) = mappings
        same = (name for name, value in arguments.items() if value is hparams)
        name = next(same, None)
        if ignored and isinstance(hparams, (dict, Namespace)):
            values = vars(hparams) if isinstance(hparams, Namespace) else hparams
            hparams = {key: value for key, value in values.items() if key not in ignored}
        return name, hparams
    unknown = [arg for arg in args if arg not in arguments and arg not in ignored]
    if unknown:
        raise MisconfigurationException(
            f"save_hyperparameters: {', '.join(map(repr, unknown))} is no argument of __init__; "
            f"its arguments are {', '.join(map(repr, arguments)) or 'none'}"
        )
    return "kwargs", {arg: arguments[arg] for arg in args if arg in arguments}


def _warn_of_modules(hparams: Any) -> None:
    if not isinstance(hparams, dict):
        return
    for name, value in hparams.items():
        if isinstance(value, nn.Module):
            rank_zero_warn(
                f"Attribute {name!r} is an instance of `nn.Module` and is already saved during"
                " checkpointing. It is recommended to ignore them using"
                f" `self.save_hyperparameters(ignore=[{name!r}])`."
            )


# ── Attributes of a module, its hyper-parameters or its data module ───────────────────────────────


def _holders(model: Any, attribute: str) -> list[Any]:
    """The objects that have an attribute: the model, its hparams, its trainer's data module."""
    found: list[Any] = []
    if hasattr(model, attribute):
        found.append(model)
    hparams = getattr(model, "hparams", None)
    if hparams is not None:
        has = attribute in hparams if isinstance(hparams, Mapping) else hasattr(hparams, attribute)
        if has:
            found.append(hparams)
    trainer = model.__dict__.get("_trainer", model.__dict__.get("trainer"))
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        if hasattr(datamodule, attribute):
            found.append(datamodule)
        elif attribute in getattr(datamodule, "hparams", {}):
            found.append(datamodule.hparams)
    return found


def _some_holders(model: Any, attribute: str) -> list[Any]:
    found = _holders(model, attribute)
    if not found:
        raise AttributeError(
            f"{attribute} is neither stored in the model namespace"
            " nor the `hparams` namespace/dict, nor the datamodule."
        )
    return found


def lightning_hasattr(model: Any, attribute: str) -> bool:
    """Whether a module, its hyper-parameters or its data module has an attribute."""
    return bool(_holders(model, attribute))


def lightning_getattr(model: Any, attribute: str) -> Any:
    """The attribute of a module, its hyper-parameters or its data module; the last that has it.

    Raises:
        AttributeError: none of them has it.
    """
    holder = _some_holders(model, attribute)[-1]
    return holder[attribute] if isinstance(holder, Mapping) else getattr(holder, attribute)


def lightning_setattr(model: Any, attribute: str, value: Any) -> None:
    """Set the attribute wherever it is: in the module, its hyper-parameters, its data module.

    Raises:
        AttributeError: none of them has it.
    """
    for holder in _some_holders(model, attribute):
        if isinstance(holder, MutableMapping):
            holder[attribute] = value
        else:
            setattr(holder, attribute, value)
