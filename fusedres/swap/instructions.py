"""What each instruction of CPython 3.10 to 3.14 does to a frame; the names are those of the `dis` module."""

from __future__ import annotations

import dis
from typing import Any

from .frame import NULL, VERSION, Frame, operation
from .values import ABSENT, Cell, Closure, NotTraceable

# --- nothing, constants, variables -------------------------------------------------------------------------------


@operation("NOP", "RESUME", "CACHE", "EXTENDED_ARG", "PRECALL", "COPY_FREE_VARS", "NOT_TAKEN", "SETUP_ANNOTATIONS",
            "RETURN_GENERATOR", "GEN_START", "END_FOR")  # fmt: skip
def _nothing(frame: Frame, each: dis.Instruction) -> None:
    # A generator begins by handing itself out, and popping what it is sent.
    if each.opname == "RETURN_GENERATOR":
        frame.push(None)
    elif each.opname == "GEN_START":
        pass


@operation("POP_TOP", "POP_ITER")
def _pop(frame: Frame, each: dis.Instruction) -> None:
    if frame.stack:
        frame.pop()


@operation("PUSH_NULL")
def _null(frame: Frame, each: dis.Instruction) -> None:
    frame.push(NULL)


@operation("LOAD_CONST", "LOAD_SMALL_INT")
def _constant(frame: Frame, each: dis.Instruction) -> None:
    frame.push(each.argval)


@operation("LOAD_ASSERTION_ERROR", "LOAD_COMMON_CONSTANT")
def _assertion(frame: Frame, each: dis.Instruction) -> None:
    if each.opname == "LOAD_ASSERTION_ERROR" or each.argval is AssertionError:
        raise NotTraceable("an assertion of it does not hold")
    frame.push(each.argval)


@operation("LOAD_FAST", "LOAD_FAST_CHECK", "LOAD_FAST_BORROW", "LOAD_CLOSURE")
def _load(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.load(each.argval))


@operation("LOAD_FAST_LOAD_FAST", "LOAD_FAST_BORROW_LOAD_FAST_BORROW")
def _load_two(frame: Frame, each: dis.Instruction) -> None:
    for name in each.argval:
        frame.push(frame.load(name))


@operation("LOAD_FAST_AND_CLEAR")
def _load_and_clear(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.names.get(each.argval, ABSENT))
    frame.names[each.argval] = ABSENT


@operation("STORE_FAST")
def _store(frame: Frame, each: dis.Instruction) -> None:
    frame.names[each.argval] = frame.pop()


@operation("STORE_FAST_STORE_FAST")
def _store_two(frame: Frame, each: dis.Instruction) -> None:
    for name in each.argval:
        frame.names[name] = frame.pop()


@operation("STORE_FAST_LOAD_FAST")
def _store_load(frame: Frame, each: dis.Instruction) -> None:
    stored, loaded = each.argval
    frame.names[stored] = frame.pop()
    frame.push(frame.load(loaded))


@operation("DELETE_FAST")
def _delete(frame: Frame, each: dis.Instruction) -> None:
    frame.names[each.argval] = ABSENT


@operation("MAKE_CELL")
def _make_cell(frame: Frame, each: dis.Instruction) -> None:
    frame.names[each.argval] = Cell(frame.names.get(each.argval, ABSENT))


@operation("LOAD_DEREF")
def _load_deref(frame: Frame, each: dis.Instruction) -> None:
    cell = frame.load(each.argval)
    if cell.value is ABSENT:
        raise NotTraceable(f"the variable {each.argval} has no value there")
    frame.push(cell.value)


@operation("STORE_DEREF")
def _store_deref(frame: Frame, each: dis.Instruction) -> None:
    if each.argval in frame.code.co_freevars and not isinstance(frame.load(each.argval), Cell):
        raise NotTraceable(f"it writes to {each.argval}, a variable outside of it")
    frame.names[each.argval].value = frame.pop()


@operation("LOAD_GLOBAL")
def _load_global(frame: Frame, each: dis.Instruction) -> None:
    # The order of the two does not matter to who takes them off.
    if VERSION >= (3, 11) and (each.arg or 0) & 1:
        frame.push(NULL)
    frame.push(frame.semantics.load_global(frame.scope, each.argval))


# --- the stack ---------------------------------------------------------------------------------------------------


@operation("COPY", "DUP_TOP")
def _copy(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.stack[-(each.arg or 1)])


@operation("DUP_TOP_TWO")
def _copy_two(frame: Frame, each: dis.Instruction) -> None:
    frame.stack += frame.stack[-2:]


@operation("SWAP")
def _swap(frame: Frame, each: dis.Instruction) -> None:
    stack, n = frame.stack, each.arg or 0
    stack[-1], stack[-n] = stack[-n], stack[-1]


@operation("ROT_TWO", "ROT_THREE", "ROT_FOUR", "ROT_N")
def _rotate(frame: Frame, each: dis.Instruction) -> None:
    count = {"ROT_TWO": 2, "ROT_THREE": 3, "ROT_FOUR": 4}.get(each.opname, each.arg or 0)
    frame.stack.insert(len(frame.stack) - count, frame.stack.pop())


# --- operators ---------------------------------------------------------------------------------------------------

_OLD = {
    "ADD": "+", "SUBTRACT": "-", "MULTIPLY": "*", "TRUE_DIVIDE": "/", "FLOOR_DIVIDE": "//", "MODULO": "%",
    "POWER": "**", "AND": "&", "OR": "|", "XOR": "^", "LSHIFT": "<<", "RSHIFT": ">>",
    "MATRIX_MULTIPLY": "@", "SUBSCR": "[]",
}  # fmt: skip
_OLD_OPERATORS = {
    **{f"BINARY_{name}": sign for name, sign in _OLD.items()},
    **{f"INPLACE_{name}": f"{sign}=" for name, sign in _OLD.items() if sign != "[]"},
}


@operation("BINARY_OP", *_OLD_OPERATORS)
def _binary(frame: Frame, each: dis.Instruction) -> None:
    a, b = frame.pops(2)
    sign = _OLD_OPERATORS.get(each.opname) or dis._nb_ops[each.arg][1]  # type: ignore[attr-defined]
    frame.push(frame.semantics.binary(sign, a, b))


@operation("UNARY_NEGATIVE", "UNARY_POSITIVE", "UNARY_INVERT")
def _unary(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.unary(each.opname.removeprefix("UNARY_").lower(), frame.pop()))


@operation("UNARY_NOT")
def _not(frame: Frame, each: dis.Instruction) -> None:
    frame.push(not frame.semantics.truth(frame.pop()))


@operation("TO_BOOL")
def _to_bool(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.truth(frame.pop()))


@operation("COMPARE_OP")
def _compare(frame: Frame, each: dis.Instruction) -> None:
    a, b = frame.pops(2)
    value = frame.semantics.binary(each.argval, a, b)
    is_asked = VERSION >= (3, 13) and (each.arg or 0) & 16
    frame.push(frame.semantics.truth(value) if is_asked else value)


@operation("IS_OP")
def _is(frame: Frame, each: dis.Instruction) -> None:
    a, b = frame.pops(2)
    frame.push(frame.semantics.is_same(a, b) != bool(each.arg))


@operation("CONTAINS_OP")
def _contains(frame: Frame, each: dis.Instruction) -> None:
    value, container = frame.pops(2)
    frame.push(frame.semantics.truth(frame.semantics.contains(container, value)) != bool(each.arg))


# --- jumps and loops ---------------------------------------------------------------------------------------------


@operation("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_BACKWARD_NO_INTERRUPT", "JUMP_ABSOLUTE", "JUMP")
def _jump(frame: Frame, each: dis.Instruction) -> int:
    return frame.target(each)


@operation(*(f"POP_JUMP{way}_IF_{what}" for way in ("", "_FORWARD", "_BACKWARD") for what in
              ("TRUE", "FALSE", "NONE", "NOT_NONE")))  # fmt: skip
def _jump_if(frame: Frame, each: dis.Instruction) -> int | None:
    value, what = frame.pop(), each.opname.partition("_IF_")[2]
    if "NONE" in what:
        jumps = frame.semantics.is_same(value, None) == (what == "NONE")
    else:
        jumps = frame.semantics.truth(value) == (what == "TRUE")
    return frame.target(each) if jumps else None


@operation("JUMP_IF_TRUE_OR_POP", "JUMP_IF_FALSE_OR_POP")
def _jump_or_pop(frame: Frame, each: dis.Instruction) -> int | None:
    if frame.semantics.truth(frame.stack[-1]) == ("TRUE" in each.opname):
        return frame.target(each)
    frame.pop()
    return None


@operation("GET_ITER", "GET_YIELD_FROM_ITER")
def _iterate(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.iterate(frame.pop()))


@operation("FOR_ITER")
def _for(frame: Frame, each: dis.Instruction) -> int | None:
    try:
        frame.push(next(frame.stack[-1]))
    except StopIteration:
        end = frame.target(each)
        if frame.found[end].opname == "END_FOR":
            end += 1
        # From 3.13 on what follows takes the iterator off.
        if VERSION < (3, 13):
            frame.pop()
        return end
    return None


# --- containers --------------------------------------------------------------------------------------------------


@operation("BUILD_TUPLE", "BUILD_LIST", "BUILD_SET", "BUILD_STRING", "BUILD_SLICE")
def _build(frame: Frame, each: dis.Instruction) -> None:
    values = frame.pops(each.arg or 0)
    kind = each.opname.removeprefix("BUILD_")
    if kind == "SLICE":
        frame.push(slice(*values))
    elif kind == "STRING":
        frame.push(frame.semantics.joined(values))
    else:
        frame.push({"TUPLE": tuple, "LIST": list, "SET": set}[kind](values))


@operation("BUILD_MAP")
def _build_map(frame: Frame, each: dis.Instruction) -> None:
    values = frame.pops(2 * (each.arg or 0))
    frame.push(dict(zip(values[::2], values[1::2], strict=True)))


@operation("BUILD_CONST_KEY_MAP")
def _build_constant_map(frame: Frame, each: dis.Instruction) -> None:
    keys = frame.pop()
    frame.push(dict(zip(keys, frame.pops(len(keys)), strict=True)))


@operation("LIST_TO_TUPLE")
def _to_tuple(frame: Frame, each: dis.Instruction) -> None:
    frame.push(tuple(frame.pop()))


@operation("CALL_INTRINSIC_1")
def _intrinsic(frame: Frame, each: dis.Instruction) -> None:
    if each.argrepr == "INTRINSIC_LIST_TO_TUPLE":
        frame.push(tuple(frame.pop()))
    elif each.argrepr == "INTRINSIC_UNARY_POSITIVE":
        frame.push(frame.semantics.unary("positive", frame.pop()))
    else:
        raise NotTraceable(f"what it does is not followed ({each.argrepr})")


@operation("LIST_APPEND", "SET_ADD", "LIST_EXTEND", "SET_UPDATE")
def _put(frame: Frame, each: dis.Instruction) -> None:
    value = frame.pop()
    if each.opname in ("LIST_EXTEND", "SET_UPDATE"):
        value = list(frame.semantics.iterate(value))
    holder, name = frame.stack[-(each.arg or 1)], each.opname.partition("_")[2].lower()
    getattr(holder, name)(value)


@operation("MAP_ADD")
def _put_pair(frame: Frame, each: dis.Instruction) -> None:
    key, value = frame.pops(2)
    frame.stack[-(each.arg or 1)][key] = value


@operation("DICT_UPDATE", "DICT_MERGE")
def _put_dict(frame: Frame, each: dis.Instruction) -> None:
    value = frame.pop()
    if not isinstance(value, dict):
        raise NotTraceable("it spreads with ** what is no dict")
    frame.stack[-(each.arg or 1)].update(value)


@operation("BINARY_SLICE")
def _slice(frame: Frame, each: dis.Instruction) -> None:
    value, start, stop = frame.pops(3)
    frame.push(frame.semantics.binary("[]", value, slice(start, stop)))


@operation("STORE_SUBSCR")
def _store_item(frame: Frame, each: dis.Instruction) -> None:
    value, container, key = frame.pops(3)
    frame.semantics.store_item(container, key, value)


@operation("STORE_SLICE")
def _store_slice(frame: Frame, each: dis.Instruction) -> None:
    value, container, start, stop = frame.pops(4)
    frame.semantics.store_item(container, slice(start, stop), value)


@operation("DELETE_SUBSCR")
def _delete_item(frame: Frame, each: dis.Instruction) -> None:
    frame.semantics.delete_item(*frame.pops(2))


@operation("UNPACK_SEQUENCE")
def _unpack(frame: Frame, each: dis.Instruction) -> None:
    frame.stack += reversed(frame.semantics.unpacked(frame.pop(), each.arg or 0))


@operation("UNPACK_EX")
def _unpack_more(frame: Frame, each: dis.Instruction) -> None:
    before, after = (each.arg or 0) & 0xFF, (each.arg or 0) >> 8
    values = list(frame.semantics.iterate(frame.pop()))
    if len(values) < before + after:
        raise NotTraceable("it unpacks more values than there are")
    end = len(values) - after
    frame.stack += reversed([*values[:before], values[before:end], *values[end:]])


# --- attributes, calls, functions --------------------------------------------------------------------------------


@operation("LOAD_ATTR", "LOAD_METHOD")
def _attribute(frame: Frame, each: dis.Instruction) -> None:
    value = frame.semantics.attribute(frame.pop(), each.argval)
    if each.opname == "LOAD_METHOD" or (VERSION >= (3, 12) and (each.arg or 0) & 1):
        frame.push(NULL)
    frame.push(value)


@operation("LOAD_SUPER_ATTR")
def _super_attribute(frame: Frame, each: dis.Instruction) -> None:
    _, cls, owner = frame.pops(3)
    value = frame.semantics.super_attribute(owner, cls, each.argval)
    if (each.arg or 0) & 1:
        frame.push(NULL)
    frame.push(value)


@operation("STORE_ATTR")
def _store_attribute(frame: Frame, each: dis.Instruction) -> None:
    raise NotTraceable(f"its forward writes to an attribute, {each.argval}")


@operation("KW_NAMES")
def _keyword_names(frame: Frame, each: dis.Instruction) -> None:
    frame.keywords = frame.code.co_consts[each.arg or 0]


@operation("CALL", "CALL_METHOD")
def _call(frame: Frame, each: dis.Instruction) -> None:
    names, frame.keywords = frame.keywords, ()
    frame.called_with(each.arg or 0, names)


@operation("CALL_KW")
def _call_with_names(frame: Frame, each: dis.Instruction) -> None:
    names = frame.pop()
    frame.called_with(each.arg or 0, names)


@operation("CALL_FUNCTION", "CALL_FUNCTION_KW")
def _call_function(frame: Frame, each: dis.Instruction) -> None:
    names = frame.pop() if each.opname == "CALL_FUNCTION_KW" else ()
    frame.stack.insert(len(frame.stack) - (each.arg or 0), NULL)
    frame.called_with(each.arg or 0, names)


@operation("CALL_FUNCTION_EX")
def _call_spread(frame: Frame, each: dis.Instruction) -> None:
    has_keywords = VERSION >= (3, 14) or (each.arg or 0) & 1
    keywords = frame.pop() if has_keywords else {}
    args = list(frame.semantics.iterate(frame.pop()))
    if VERSION < (3, 11):
        frame.stack.insert(len(frame.stack) - 1, NULL)
    frame.called(args, {} if keywords is NULL else dict(keywords))


@operation("MAKE_FUNCTION")
def _make_function(frame: Frame, each: dis.Instruction) -> None:
    if VERSION < (3, 11):
        frame.pop()  # its name
    made = Closure(frame.pop(), frame.scope)
    flags = 0 if VERSION >= (3, 13) else each.arg or 0
    for flag in (8, 4, 2, 1):
        if flags & flag:
            _set_on(made, flag, frame.pop())
    frame.push(made)


@operation("SET_FUNCTION_ATTRIBUTE")
def _set_function_attribute(frame: Frame, each: dis.Instruction) -> None:
    value, made = frame.pops(2)
    _set_on(made, each.arg or 0, value)
    frame.push(made)


def _set_on(made: Closure, flag: int, value: Any) -> None:
    if flag == 8:
        made.cells = tuple(value)
    elif flag == 2:
        made.keyword_defaults = dict(value)
    elif flag == 1:
        made.defaults = tuple(value)


@operation("IMPORT_NAME")
def _import(frame: Frame, each: dis.Instruction) -> None:
    level, names = frame.pops(2)
    frame.push(frame.semantics.imported(each.argval, level, names, frame.scope))


@operation("IMPORT_FROM")
def _import_from(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.attribute(frame.stack[-1], each.argval))


@operation("FORMAT_VALUE")
def _format(frame: Frame, each: dis.Instruction) -> None:
    flags = each.arg or 0
    spec = frame.pop() if flags & 4 else ""
    frame.push(frame.semantics.formatted(frame.pop(), flags & 3, spec))


@operation("FORMAT_SIMPLE")
def _format_simple(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.formatted(frame.pop(), 0, ""))


@operation("FORMAT_WITH_SPEC")
def _format_with(frame: Frame, each: dis.Instruction) -> None:
    spec = frame.pop()
    frame.push(frame.semantics.formatted(frame.pop(), 0, spec))


@operation("CONVERT_VALUE")
def _convert(frame: Frame, each: dis.Instruction) -> None:
    frame.push(frame.semantics.formatted(frame.pop(), each.arg or 0, ""))
