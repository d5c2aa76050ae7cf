"""Damage to bytes and to JSON content, from a seeded random generator."""

import copy
import json
import random
from typing import Any

__all__ = ["JUNK", "damage_bytes", "damage_json", "flip_bits"]

JUNK: tuple[Any, ...] = (
    *(None, -1, 0, 1e308, float("nan"), "x", "", [], {}, True, [[]], 2**63, "1", [1, 2, 3, 4], -0.5),
    *("../../../../etc/passwd", "a\0b"),
)
_KINDS = ("truncate", "one bit", "20 bits", "1 percent", "head", "zeros", "repeat", "cut", "insert", "tail")


def flip_bits(data: bytes, rng: random.Random, n: int) -> bytes:
    """Flip n random bits."""
    changed = bytearray(data)
    for _ in range(n if data else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def damage_bytes(data: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage bytes in one random way; return the way and the result."""
    kind, at, n = rng.choice(_KINDS), rng.randrange(len(data)), rng.randint(1, 400)
    edge = min(len(data), 200)
    few = rng.randint(1, 6)
    results = {
        "truncate": lambda: data[:at],
        "one bit": lambda: flip_bits(data, rng, 1),
        "20 bits": lambda: flip_bits(data, rng, 20),
        "1 percent": lambda: flip_bits(data, rng, max(1, len(data) // 100)),
        "head": lambda: flip_bits(data[:edge], rng, few) + data[edge:],
        "zeros": lambda: data[:at] + bytes(len(data[at : at + n])) + data[at + n :],
        "repeat": lambda: data[:at] + data[at : at + n] + data[at:],
        "cut": lambda: data[:at] + data[at + n :],
        "insert": lambda: data[:at] + rng.randbytes(n // 4 + 1) + data[at:],
        "tail": lambda: data[:-edge] + flip_bits(data[-edge:], rng, few),
    }
    return kind, results[kind]()


def damage_json(content: Any, rng: random.Random) -> tuple[str, bytes]:
    """Damage the text of JSON content, or replace, delete or repeat one to three random values in it."""
    if rng.random() < 0.12:
        return damage_bytes(json.dumps(content).encode(), rng)
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        _edit(content, rng)
    return "edit", json.dumps(content).encode()


def _edit(node: Any, rng: random.Random) -> None:
    """Change one random value below a node."""
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not keys:
            return
        key = rng.choice(keys)
        below = node[key]
        if isinstance(below, (dict, list)) and below and rng.random() < 0.85:
            node = below
            continue
        action = rng.choice(("junk", "junk", "junk", "delete", "repeat"))
        if action == "delete":
            del node[key]
        elif action == "repeat" and isinstance(node, list):
            node.append(copy.deepcopy(below))
        else:
            node[key] = copy.deepcopy(rng.choice(JUNK))
        return
