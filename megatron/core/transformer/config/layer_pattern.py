"""Read --moe-layer-freq, a number or a pattern such as ([0]*3+[1]*9), without ``eval``."""

import ast

_LONGEST = 100_000


def parse_layer_pattern(text: str) -> int | list[int]:
    """Turn ``2``, ``[0,1]*6`` or ``([0]*3+[1]*9)`` into a number or a list of numbers.

    Only whole numbers, lists of them, ``+`` of two lists and ``*`` of a list and a number exist.

    Raises:
        ValueError: The text is anything else.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{text!r} is no number and no pattern such as ([0]*3+[1]*9)") from error
    return _value(tree.body, text)


def _value(node: ast.expr, text: str) -> int | list[int]:
    match node:
        case ast.Constant(value=int() as number) if not isinstance(number, bool):
            return number
        case ast.List(elts=parts):
            return [_number(part, text) for part in parts]
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            first, second = _value(left, text), _value(right, text)
            if isinstance(first, list) and isinstance(second, list):
                return first + second
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _repeat(_value(left, text), _value(right, text), text)
    raise _unreadable(text)


def _number(node: ast.expr, text: str) -> int:
    value = _value(node, text)
    if isinstance(value, list):
        raise _unreadable(text)
    return value


def _repeat(left: int | list[int], right: int | list[int], text: str) -> list[int]:
    pattern, times = (left, right) if isinstance(left, list) else (right, left)
    if not isinstance(pattern, list) or not isinstance(times, int):
        raise _unreadable(text)
    if len(pattern) * times > _LONGEST:
        raise ValueError(f"{text!r} has more than {_LONGEST} entries")
    return pattern * times


def _unreadable(text: str) -> ValueError:
    return ValueError(
        f"{text!r} may hold only whole numbers, lists, + of two lists and list * number, "
        "such as ([0]*3+[1]*9)"
    )
