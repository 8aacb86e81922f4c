"""Arguments of a class from the command line and from environment variables."""

from __future__ import annotations

import functools
import inspect
import os
import types
import typing
from argparse import ArgumentParser, Namespace
from ast import literal_eval
from collections.abc import Callable, Iterator
from typing import Any

from puretrain.lightning.utilities.parsing import (
    str_to_bool,
    str_to_bool_or_int,
    str_to_bool_or_str,
)

__all__ = [
    "add_argparse_args",
    "from_argparse_args",
    "get_abbrev_qualified_cls_name",
    "get_init_arguments_and_types",
    "overwrite_by_env_vars",
    "parse_argparser",
    "parse_args_from_docstring",
    "parse_env_variables",
]

_PLAIN = (bool, int, float, str)


def _own_parameters(cls: Any) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The named arguments of an ``__init__`` and their resolved annotations."""
    init = inspect.unwrap(cls.__init__)
    try:
        hints = typing.get_type_hints(init)
    except (NameError, TypeError, AttributeError):
        hints = {}  # an annotation that exists for type checkers only
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for number, parameter in enumerate(inspect.signature(init).parameters.values()):
        if number and parameter.kind not in variable:
            yield parameter, hints.get(parameter.name, parameter.annotation)


def _types_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, one type of anything else, none of no annotation."""
    if annotation is inspect.Parameter.empty:
        return ()
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return tuple(each for part in typing.get_args(annotation) for each in _types_of(part))
    return (annotation,)


def get_init_arguments_and_types(cls: Any) -> list[tuple[str, tuple[Any, ...], Any]]:
    """The arguments of ``__init__``: their names, types and defaults.

    >>> class Model:
    ...     def __init__(self, width: int = 2, rate: float | None = None): ...
    >>> get_init_arguments_and_types(Model)
    [('width', (<class 'int'>,), 2), ('rate', (<class 'float'>, <class 'NoneType'>), None)]
    """
    return [
        (parameter.name, _types_of(annotation), parameter.default)
        for parameter, annotation in _own_parameters(cls)
    ]


def get_abbrev_qualified_cls_name(cls: Any) -> str:
    """``pl.Trainer`` for a class of this package, the full name for any other."""
    if cls.__module__.startswith("puretrain.lightning"):
        return f"pl.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def _literal(text: str) -> Any:
    """A number, list, bool or None if the text is one, else the text.

    >>> _literal("2"), _literal("0.5"), _literal("true"), _literal("auto"), _literal("1,2")
    (2, 0.5, True, 'auto', '1,2')
    """
    if text.lower() in ("none", "null"):
        return None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if "," in text and not text.startswith(("[", "(", "{")):
        return text  # a list of devices: the Trainer reads it
    try:
        return literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _int_or_float(text: str) -> int | float:
    return float(text) if "." in text or "e" in text.lower() else int(text)


def _reader(name: str, kinds: tuple[Any, ...], default: Any) -> tuple[Callable[[str], Any], bool]:
    """How to read an option, and whether it may stand without a value, for True."""
    plain = tuple(kind for kind in _PLAIN if kind in kinds)
    if name in ("gpus", "tpu_cores", "devices"):
        return _literal, False
    if not plain:
        return (_flag, True) if isinstance(default, bool) else (_literal, False)
    if bool in plain:
        if plain == (bool,):
            return str_to_bool, True
        return (str_to_bool_or_int if int in plain else str_to_bool_or_str), True
    if plain == (int, float):
        return _int_or_float, False
    return (plain[0] if len(plain) == 1 else _literal), False


def _flag(text: str) -> Any:
    value = str_to_bool_or_str(text)
    return value if isinstance(value, bool) else _literal(text)


def add_argparse_args(
    cls: Any,
    parent_parser: ArgumentParser,
    *,
    use_argument_group: bool = True,
) -> ArgumentParser:
    """Add an option for each argument of a class's ``__init__`` to a parser.

    Args:
        cls: the class.
        parent_parser: the parser.
        use_argument_group: whether the options are a group of the parser; if not, they are in a
            new parser, which has those of the old one as well.

    Returns:
        The parser that has the options.

    >>> class Model:
    ...     def __init__(self, width: int = 2, deep: bool = False): ...
    >>> parser = add_argparse_args(Model, ArgumentParser())
    >>> parser.parse_args(["--width", "3", "--deep"])
    Namespace(width=3, deep=True)
    """
    if not isinstance(parent_parser, ArgumentParser):
        raise RuntimeError(  # noqa: TRY004 - programs catch it
            "Please only pass an `ArgumentParser` instance."
        )
    parser: Any
    if use_argument_group:
        parser = parent_parser.add_argument_group(get_abbrev_qualified_cls_name(cls))
    else:
        parent_parser = parser = ArgumentParser(parents=[parent_parser], add_help=False)
    texts = parse_args_from_docstring(cls.__init__.__doc__ or cls.__doc__ or "")
    taken = {action.dest for action in parent_parser._actions}
    for name, kinds, default in get_init_arguments_and_types(cls):
        if name in taken:
            continue
        read, bare = _reader(name, kinds, default)
        parser.add_argument(
            f"--{name}",
            dest=name,
            default=None if default is inspect.Parameter.empty else default,
            type=read,
            help=texts.get(name, "").replace("%", "%%"),
            **({"nargs": "?", "const": True} if bare else {}),
        )
    return parent_parser


def parse_args_from_docstring(docstring: str) -> dict[str, str]:
    """What the ``Args`` of a docstring say, by argument.

    >>> parse_args_from_docstring('''Make it.
    ...
    ... Args:
    ...     width: of a layer,
    ...         in units.
    ... ''')
    {'width': 'of a layer, in units.'}
    """
    texts: dict[str, list[str]] = {}
    current, indent, inside = "", None, False
    for line in inspect.cleandoc(docstring).splitlines():
        text = line.strip()
        if text in ("Args:", "Arguments:", "Parameters:"):
            inside, indent = True, None
            continue
        if not inside or not text:
            continue
        depth = len(line) - len(line.lstrip())
        if depth == 0:
            break
        indent = depth if indent is None else indent
        name, colon, rest = text.partition(":")
        if depth == indent and colon:
            current = name.split("(")[0].strip()
            texts[current] = [rest.strip()] if rest.strip() else []
        elif current:
            texts[current].append(text)
    return {name: " ".join(lines) for name, lines in texts.items()}


def parse_argparser(cls: Any, arg_parser: ArgumentParser | Namespace) -> Namespace:
    """The arguments of the command line, in which an option without a value is True.

    Args:
        cls: the class whose arguments they are.
        arg_parser: a parser, which reads ``sys.argv``, or what it read.
    """
    args = arg_parser.parse_args() if isinstance(arg_parser, ArgumentParser) else arg_parser
    known = {name: (kinds, default) for name, kinds, default in get_init_arguments_and_types(cls)}
    values = dict(vars(args))
    for name, value in values.items():
        kinds, default = known.get(name, ((), None))
        if value is None and isinstance(default, bool) and (bool in kinds or not kinds):
            values[name] = True
    return Namespace(**values)


def from_argparse_args(cls: Any, args: Namespace | ArgumentParser, **kwargs: Any) -> Any:
    """Make an object with arguments from the command line.

    Args:
        cls: the class.
        args: a parser or what it read; other options in it are left alone.
        **kwargs: count before those of the command line.

    >>> class Model:
    ...     def __init__(self, width: int = 2, rate: float = 0.1):
    ...         self.width, self.rate = width, rate
    >>> model = from_argparse_args(Model, Namespace(width=8, seed=1), rate=0.5)
    >>> model.width, model.rate
    (8, 0.5)
    """
    if isinstance(args, ArgumentParser):
        args = parse_argparser(cls, args)
    given = vars(args)
    names = inspect.signature(cls.__init__).parameters
    chosen = {name: given[name] for name in names if name in given}
    return cls(**{**chosen, **kwargs})


def parse_env_variables(cls: Any, template: str = "PL_%(cls_name)s_%(cls_argument)s") -> Namespace:
    """The arguments that environment variables give, such as ``PL_TRAINER_MAX_EPOCHS=3``.

    Args:
        cls: the class whose arguments they are.
        template: the name of a variable, before it is put in upper case.
    """
    found = {}
    for name, _, _ in get_init_arguments_and_types(cls):
        variable = template % {"cls_name": cls.__name__, "cls_argument": name}
        text = os.environ.get(variable.upper())
        if text:
            found[name] = _literal(text)
    return Namespace(**found)


def overwrite_by_env_vars(init: Callable[..., Any]) -> Callable[..., Any]:
    """Let environment variables give the arguments of an ``__init__`` that the caller does not."""

    @functools.wraps(init)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not any(name.startswith("PL_") for name in os.environ):
            return init(self, *args, **kwargs)
        cls: Any = next(c for c in type(self).__mro__ if c.__dict__.get("__init__") is wrapped)
        found = vars(parse_env_variables(cls))
        names = list(inspect.signature(init).parameters)[1 : 1 + len(args)]
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        return init(self, **{**found, **given})

    return wrapped


_defaults_from_env_vars = overwrite_by_env_vars
