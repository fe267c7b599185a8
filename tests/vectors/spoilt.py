"""Files as other programs leave them, and files that a reader must refuse."""

import json


def header_and_body(data):
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def packed(header, body):
    raw = (
        header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode()
    )
    return len(raw).to_bytes(8, "little") + raw + body


def stated(data, change):
    """Returns the file with the manifest changed."""
    header, body = header_and_body(data)
    manifest = json.loads(header["__metadata__"]["hf_lora"])
    change(manifest)
    header["__metadata__"]["hf_lora"] = json.dumps(manifest, separators=(",", ":"))
    return packed(header, body)


def without(data, *keys):
    """Returns the file as another program leaves it."""
    header, body = header_and_body(data)
    for key in keys:
        del header["__metadata__"][key]
    return packed(header, body)


def with_bare_magnitudes(data):
    """Returns the file with the names that plain peft gives magnitudes."""
    header, body = header_and_body(data)
    bare = "lora_magnitude_vector"
    return packed({name.replace(f"{bare}.weight", bare): e for name, e in header.items()}, body)


def with_nan(data):
    header, body = header_and_body(data)
    return packed(header, body[:-4] + b"\x00\x00\xc0\x7f")


def with_gap(data):
    header, body = header_and_body(data)
    last = max((e["data_offsets"], name) for name, e in header.items() if name != "__metadata__")
    header[last[1]]["data_offsets"] = [last[0][0] + 4, last[0][1] + 4]
    return packed(header, body + b"\0\0\0\0")


def with_name_twice(data):
    header, body = header_and_body(data)
    raw = json.dumps(header, separators=(",", ":"))
    name = next(name for name in header if name != "__metadata__")
    return packed(f"{raw[:-1]},{json.dumps(name)}:{json.dumps(header[name])}}}".encode(), body)


def refusals(data):
    """Returns name -> (a file that must be refused, the error's field)."""
    path = "blocks.0.attn.to_q"

    def config(**fields):
        return stated(data, lambda m: m["configs"]["transformer"].update(fields))

    def top(**fields):
        return stated(data, lambda m: m.update(fields))

    def newer_fingerprint(manifest):
        manifest["base"]["fingerprints"]["transformer"]["version"] = 2

    return {
        "digest": (top(digest="v1:sha256:" + "0" * 64), "digest"),
        "damaged_value": (data[:-1] + bytes([data[-1] ^ 1]), "digest"),
        "other_scaling": (config(lora_alpha=5), "digest"),
        "newer_format": (top(format=2), "format"),
        "unknown_critical": (top(critical=["fused", "unheard_of"]), "critical"),
        "wrong_kind": (top(host=3), "host"),
        "no_configs": (stated(data, lambda m: m.pop("configs")), "configs"),
        "newer_fingerprint": (stated(data, newer_fingerprint), "fingerprint"),
        "rank_disagrees": (config(r=3), path),
        "no_scaling": (config(lora_alpha=0), "lora_alpha"),
        "expression": (config(alpha_pattern={"to_(q|k)": 3}), "alpha_pattern"),
        "not_finite": (with_nan(data), f"{path}.lora_B"),
        "gap": (with_gap(data), f"transformer.{path}.lora_B.weight"),
        "name_twice": (with_name_twice(data), ""),
        "cut": (data[:-4], ""),
    }
