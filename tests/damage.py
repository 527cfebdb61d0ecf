"""Damage to files that gatepress reads: bytes, JSON fields, headers of safetensors, parts of ONNX graphs."""

# ruff: noqa: ARG001 - what is done to one kind of file has one signature

import hashlib
import json
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Draw = random.Random

MANIFESTS = ("gatepress_run.json", "gatepress_pruned.json", "gatepress_onnx.json")
WEIGHTS = {".json": 2, ".safetensors": 4, ".onnx": 6, ".data": 2, ".md": 0.2, ".py": 0.5}  # how often a file is chosen
CANNOT = (ValueError, KeyError, IndexError, TypeError, RecursionError, OverflowError, struct.error)


def damage(draw: Draw, source: Path, target: Path, *, forged: bool) -> list[str]:
    """Copy `source` to `target`, damage one file there, with `forged` sign it anew; return what was done."""
    shutil.copytree(source, target)
    files = sorted(target.iterdir())
    file = draw.choices(files, [WEIGHTS.get(path.suffix, 1) + 2 * (path.name in MANIFESTS) for path in files])[0]
    done = []
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        if not file.is_file():
            break
        usual = draw.choice((_bytes, *[BY_SUFFIX.get(file.suffix, _bytes)] * 2))
        mutate = _whole_file if draw.random() < 0.03 else usual
        try:
            done.append(f"{file.name}: {mutate(draw, file)}")
        except CANNOT as error:  # there is nothing of the kind, or no longer
            done.append(f"{file.name}: {_bytes(draw, file)} ({mutate.__name__}: {error!r})"[:200])
    if forged:
        sign(target)
    return done


def sign(directory: Path) -> None:
    """Write into the manifest what sha256 the files that it names now have; one that is damaged itself stays."""
    for manifest in (directory / name for name in MANIFESTS):
        try:
            value = json.loads(manifest.read_text())
            for part in (value.get("tensors"), value.get("resume")):
                if part:
                    part["sha256"] = _sha256(directory / part["file"], part["sha256"])
            for name, digest in value.get("sha256", {}).items():
                value["sha256"][name] = _sha256(directory / name, digest)
            manifest.write_text(json.dumps(value))
        except (OSError, AttributeError, *CANNOT):
            continue


def _sha256(path: Path, otherwise: str) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else otherwise


def _whole_file(draw: Draw, file: Path) -> str:
    what, other = (
        draw.choice(("deleted", "emptied", "a directory", "another's")),
        draw.choice(sorted(file.parent.iterdir())),
    )
    content = other.read_bytes()
    file.unlink()
    if what == "a directory":
        file.mkdir()
    elif what != "deleted":
        file.write_bytes(content if what == "another's" else b"")
    return f"{what} ({other.name})"


def _bytes(draw: Draw, file: Path) -> str:
    data = bytearray(file.read_bytes())
    at = draw.randrange(len(data) + 1) if draw.random() < 0.7 else draw.randrange(min(len(data), 64) + 1)
    length = min(draw.choice((1, 2, 4, 8, 64, 1000)), len(data) - at)
    start = draw.randrange(len(data) + 1)
    what = draw.choice(("flip", "flip", "insert", "delete", "truncate", "splice", "zero", "ones"))
    if what == "flip":
        for place in (at, *(draw.randrange(len(data) + 1) for _ in range(draw.choice((0, 0, 0, 3, 15))))):
            data[place : place + 1] = bytes(one ^ 1 << draw.randrange(8) for one in data[place : place + 1])
    elif what == "insert":
        data[at:at] = draw.randbytes(draw.choice((1, 4, 100)))
    elif what == "truncate":
        del data[at:]
    else:
        new = {"delete": b"", "zero": bytes(length), "ones": b"\xff" * length, "splice": data[start : start + length]}
        data[at : at + length] = new[what]
    file.write_bytes(data)
    return f"{what} {length} bytes at {at}"


# --- JSON

# What stands for text that json.dumps would not write.
SPELLED = {
    "@DEEP@": "[" * 50_000 + "]" * 50_000,
    "@LEVELS@": "[" * 400 + "]" * 400,
    "@OBJECTS@": '{"a":' * 3000 + "1" + "}" * 3000,
    "@DIGITS@": "9" * 9999,
}
NUMBERS = (0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**63, -(2**63), 10**12, 10**30, 10**400, 0.5, -0.0, 1e300)
NOT_FINITE = (float("nan"), float("inf"), -float("inf"))
WORDS = (
    "",
    "x",
    "0",
    "../x",
    "/etc/passwd",
    "..",
    ".",
    "a/b",
    "a\0b",
    "\ud800",
    "~",
    "~nobody-here",
    "C:\\x",
    "NaN",
    "true",
)
LINES = ("x" * 5000, "\x1b[31m", "a\nb", "float16", "\u2028")
CONTAINERS = ([], {}, [[]], [1], ["x"], {"x": None}, {"file": "../x"}, [0] * 1000)
ODD: tuple[Any, ...] = (None, True, False, *NUMBERS, *NOT_FINITE, *WORDS, *LINES, *CONTAINERS, *SPELLED)

# Keys that mean something to transformers, or to gatepress, wherever they stand.
KEYS = (  # noqa: SIM905 - a column of words reads worse
    "quantization_config attn_implementation _attn_implementation transformers_weights auto_map dtype torch_dtype "
    "tokenizer_class tokenizer_file vocab_file base_model_tp_plan pruned_heads num_labels add_cross_attention "
    "is_decoder chunk_size_feed_forward use_cache tie_word_embeddings gatepress added_tokens_decoder "
    "fix_mistral_regex _commit_hash name_or_path problem_type return_dict max_position_embeddings output_attentions "
    "label2id id2label sha256 resume device per_layer_config hidden_size vocab_size intermediate_size x"
).split()

Place = tuple[Any, Any]  # container and key


def _places(value: Any, depth: int = 0) -> Iterator[Place]:
    """Yield every container and key of a JSON value, those near the top more than once."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from [(value, key)] * max(1, 3 - depth)
        yield from _places(value[key], depth + 1)


def _delete(draw: Draw, place: Place, places: list[Place]) -> None:
    del place[0][place[1]]


def _odd(draw: Draw, place: Place, places: list[Place]) -> None:
    place[0][place[1]] = draw.choice(ODD)


def _number(draw: Draw, place: Place, places: list[Place]) -> None:
    holder, key = draw.choice([(one, name) for one, name in places if type(one[name]) in (int, float)])
    near = holder[key] + draw.choice((-1, 1, 0.5, 1000))
    holder[key] = near if draw.random() < 0.4 else draw.choice((*NUMBERS, *NOT_FINITE))


def _swap(draw: Draw, place: Place, places: list[Place]) -> None:
    (holder, key), (other, name) = place, draw.choice(places)
    holder[key], other[name] = other[name], holder[key]


def _rename(draw: Draw, place: Place, places: list[Place]) -> None:
    holder, key = place
    holder[draw.choice([str(draw.choice(ODD)), *(str(name) for _, name in places)])] = holder.pop(key)


def _add(draw: Draw, place: Place, places: list[Place]) -> None:
    place[0][draw.choice(KEYS)] = draw.choice(ODD)


def _wrap(draw: Draw, place: Place, places: list[Place]) -> None:
    holder, key = place
    holder[key] = draw.choice(([holder[key]], {"x": holder[key]}, str(holder[key])))


def _repeat(draw: Draw, place: Place, places: list[Place]) -> None:
    holder, key = draw.choice([(one, name) for one, name in places if isinstance(one, list)])
    holder[key:key] = [holder[key]] * draw.choice((1, 1000))


def _twice(draw: Draw, place: Place, places: list[Place]) -> None:
    holder, key = place
    holder[f"@TWICE@{key}"] = draw.choice(ODD)


ON_JSON = (_delete, *[_odd] * 4, _number, _number, _swap, _rename, _add, _wrap, _repeat, _twice)


def _json(draw: Draw, file: Path) -> str:
    value = json.loads(file.read_text(encoding="utf-8"))
    places = list(_places(value))
    place, change = draw.choice(places), draw.choice(ON_JSON)
    change(draw, place, places)
    text = json.dumps(value).replace("@TWICE@", "")
    for mark, spelled in SPELLED.items():
        text = text.replace(f'"{mark}"', spelled)
    file.write_text(text, encoding="utf-8")
    return f"{change.__name__} near {place[1]!r}"[:200]


# --- safetensors

DTYPES = "F64 F32 F16 BF16 I64 I32 I16 I8 U8 U16 U32 U64 BOOL F8_E4M3 F8_E5M2 F8_E8M0 F4 F6_E2M3 C64 X".split()  # noqa: SIM905 - shorter so
SIZES = (0, 1, 2, 3, 31, 33, 64, 1000, 2**31, 2**40, 2**63, 2**64 - 1, 2**64, -1)

Header = dict[str, Any]


def _offsets(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    header[name]["data_offsets"][draw.randrange(2)] = draw.choice((*SIZES, len(body), len(body) + 1, 10**30))


def _shape(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    shape = header[name]["shape"]
    header[name]["shape"] = draw.choice(
        ([], [0], [draw.choice(SIZES)], shape[::-1], [*shape, 1], [2**32, 2**32, 2**32])
    )


def _size(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    shape = header[name]["shape"]
    shape[draw.randrange(len(shape))] = draw.choice(SIZES)


def _dtype(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    header[name]["dtype"] = draw.choice(DTYPES)


def _name(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    header[draw.choice(("x", "", "../x", f"{name}.x", name[:-1], "a\0b", "\x1b[1m"))] = header.pop(name)


def _gone(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    del header[name]


def _exchanged(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    other = draw.choice(list(header))
    header[name], header[other] = header[other], header[name]


def _shared(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    header[name] = dict(header[draw.choice(list(header))])


def _value(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    start, end = header[name]["data_offsets"]
    width = 8 if header[name]["dtype"] == "I64" else 4
    at = start + width * draw.randrange(max(1, (end - start) // width))
    body[at : at + width] = draw.choice(
        (b"\xff" * width, bytes(width), draw.randbytes(width), b"\x07" + bytes(width - 1))
    )


def _metadata(draw: Draw, header: Header, body: bytearray, name: str) -> None:
    header["__metadata__"] = draw.choice(ODD[:30])


ON_SAFETENSORS = (_offsets, _shape, _size, _dtype, _name, _gone, _exchanged, _shared, _value, _value, _value, _metadata)


def _safetensors(draw: Draw, file: Path) -> str:
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), bytearray(data[8 + length :])
    name, change = draw.choice([name for name in header if name != "__metadata__"]), draw.choice(ON_SAFETENSORS)
    change(draw, header, body, name)
    raw = json.dumps(header).encode()
    said = len(raw) if draw.random() < 0.95 else draw.choice(SIZES) % 2**64
    file.write_bytes(struct.pack("<Q", said) + raw + body)
    return f"{change.__name__} of {name!r}"


# --- ONNX: a graph is given as its ModelProto

OPERATORS = (  # noqa: SIM905 - the same
    "Expand ConstantOfShape Range Tile Pad Resize Loop If Scan OneHot NonZero RandomNormal CumSum Conv Identity "
    "Reshape X"
).split()
PLACES = ("../run/gates-00000001.safetensors", "/etc/passwd", "model.onnx", "config.json", "a\0b", "", ".", "/dev/zero")
SPANS = ("-1", "0", "1", "3", "63056", "99999999", str(2**63), str(2**64), "1e3", "x", "", " 4", "\u0664")
WHOLE = (-1, 0, 1, 2, 7, 1000, -1000, 10**6, 10**9, -(10**9), 2**31, 2**40, 2**62, -(2**63), 2**63 - 1)
SMALL_BYTES = 64


def _any_name(draw: Draw, graph: Any) -> str:
    names = [name for one in graph.node for name in (*one.input, *one.output)]
    return draw.choice((*names, "", "x"))


def _dims(draw: Draw, model: Any) -> None:
    tensor = draw.choice(model.graph.initializer)
    where = draw.randrange(len(tensor.dims) + 1)
    size = draw.choice([one for one in SIZES if one < 2**63])
    tensor.dims[:] = [*tensor.dims[:where], size, *tensor.dims[where + draw.randrange(2) :]]


def _data_type(draw: Draw, model: Any) -> None:
    draw.choice(model.graph.initializer).data_type = draw.choice((0, *range(1, 26), 99, -1))


def _raw(draw: Draw, model: Any) -> None:
    tensor = draw.choice(model.graph.initializer)
    tensor.raw_data = tensor.raw_data[: draw.randrange(len(tensor.raw_data) + 1)] * draw.choice((0, 1, 2, 50))


def _whole_number(draw: Draw, model: Any) -> None:
    whole = [one for one in model.graph.initializer if one.data_type in (6, 7) and 0 < len(one.raw_data) <= SMALL_BYTES]
    tensor = draw.choice(whole)
    raw = bytearray(tensor.raw_data)
    at = 8 * draw.randrange(max(1, len(raw) // 8))
    raw[at : at + 8] = struct.pack("<q", draw.choice(WHOLE))[: len(raw) - at]
    tensor.raw_data = bytes(raw)


def _external(draw: Draw, model: Any) -> None:
    tensors = model.graph.initializer
    tensor = draw.choice([one for one in tensors if one.external_data] or list(tensors))
    tensor.data_location = draw.choice((1, 1, 1, 0))
    key = draw.choice(("location", "offset", "length", "checksum", "x"))
    kept = [(one.key, one.value) for one in tensor.external_data if one.key != key or draw.random() < 0.1]
    del tensor.external_data[:]
    for name, value in (*kept, (key, draw.choice(PLACES if key == "location" else SPANS))):
        tensor.external_data.add(key=name, value=value)


def _tensor_name(draw: Draw, model: Any) -> None:
    draw.choice(model.graph.initializer).name = _any_name(draw, model.graph)


def _operator(draw: Draw, model: Any) -> None:
    nodes = model.graph.node
    draw.choice(nodes).op_type = draw.choice((draw.choice(nodes).op_type, *OPERATORS))


def _domain(draw: Draw, model: Any) -> None:
    draw.choice(model.graph.node).domain = draw.choice(
        ("com.microsoft", "ai.onnx.ml", "x", "ai.onnx", "com.microsoft.nchwc")
    )


def _wiring(draw: Draw, model: Any) -> None:
    node = draw.choice(model.graph.node)
    ends = draw.choice([one for one in (node.input, node.output) if one])
    ends[draw.randrange(len(ends))] = _any_name(draw, model.graph)


def _nodes(draw: Draw, model: Any) -> None:
    node = draw.choice(model.graph.node)
    if draw.random() < 0.5:
        model.graph.node.remove(node)
    else:
        model.graph.node.add().CopyFrom(node)


def _attribute(draw: Draw, model: Any) -> None:
    attribute = draw.choice(draw.choice([one for one in model.graph.node if one.attribute]).attribute)
    attribute.i = draw.choice((-(2**63), -1, 0, 1, 2, 3, 1000, 2**31, 2**62))
    attribute.type = draw.choice((attribute.type, attribute.type, *range(12)))
    attribute.ints[:] = [draw.choice((-1, 0, 1, 2, 10**6, 2**40))] * draw.choice((0, len(attribute.ints), 1, 5))


def _new_attribute(draw: Draw, model: Any) -> None:
    from onnx import helper

    tensor = helper.make_tensor("t", 7, [1], [draw.choice((1, 10**9, -1))])
    body = helper.make_graph([], "body", [], [])
    name, value = draw.choice((("axis", 1), ("value", tensor), ("to", 10**9), ("body", body), ("then_branch", body)))
    draw.choice(model.graph.node).attribute.append(helper.make_attribute(name, value))


def _end(draw: Draw, model: Any) -> None:
    end = draw.choice([*model.graph.input, *model.graph.output])
    kind = end.type.tensor_type
    kind.elem_type = draw.choice((kind.elem_type, 0, 1, 6, 7, 8, 11, 99))
    draw.choice(kind.shape.dim).dim_value = draw.choice((-1, 0, 1, 3, 9, 2**40))
    end.name = draw.choice((end.name, end.name, _any_name(draw, model.graph)))


def _opset(draw: Draw, model: Any) -> None:
    draw.choice(model.opset_import).version = draw.choice((-1, 0, 1, 7, 13, 17, 25, 99, 2**62))


def _part(draw: Draw, model: Any) -> None:
    node = draw.choice(model.graph.node)
    if draw.random() < 0.5:
        model.functions.add(name=node.op_type, domain=node.domain, input=["a"], output=["a"])
    else:
        model.graph.sparse_initializer.add(dims=[2**20, 2**20]).values.CopyFrom(draw.choice(model.graph.initializer))


ON_GRAPHS = (
    *(_dims, _data_type, _raw, *[_whole_number] * 6, _external, _external, _tensor_name, _operator, _operator, _domain),
    *(_wiring, _wiring, _nodes, _nodes, _attribute, _attribute, _new_attribute, _end, _opset, _part),
)


def _onnx(draw: Draw, file: Path) -> str:
    import onnx
    from google.protobuf.message import DecodeError

    model = onnx.ModelProto()
    try:
        model.ParseFromString(file.read_bytes())
    except DecodeError as error:
        raise ValueError(str(error)) from None
    change = draw.choice(ON_GRAPHS)
    change(draw, model)
    file.write_bytes(model.SerializeToString())
    return change.__name__


BY_SUFFIX: dict[str, Callable[[Draw, Path], str]] = {".json": _json, ".safetensors": _safetensors, ".onnx": _onnx}
