"""Read --moe-layer-freq, a number or a pattern such as ([0]*3+[1]*9), without ``eval``.

The numbers of experts and of top-k of each layer are written in the same way.
"""

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


def parse_layer_numbers(text: str) -> list[int]:
    """Turn a pattern such as ``([8]*2+[16]*2)`` into one number for each layer.

    Raises:
        ValueError: The text is no pattern, or a single number.
    """
    found = parse_layer_pattern(text)
    if isinstance(found, int):
        raise ValueError(
            f"{text!r} must be a pattern with one entry for each layer, such as ([8]*2+[16]*2)"
        )
    return found


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
