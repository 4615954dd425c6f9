"""The structures of `kernels/layers.h`, field by field.

`native_library` compares the size of each with what the library says when it is loaded.
"""

import ctypes

_pointer, _size, _real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_double


def _fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


class Matrix(ctypes.Structure):
    _fields_ = _fields(_pointer, "numbers scales")


class Connection(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "n"),
        *_fields(_pointer, "fn base scale"),
        *_fields(_real, "norm_eps eps"),
        *_fields(_size, "iterations"),
    ]


class LatentAttention(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm q_norm kv_norm kv_b"),
        *_fields(Matrix, "q_a q_b kv_a out"),
        *_fields(_real, "norm_eps q_eps kv_eps scale"),
        *_fields(_size, "heads q_rank rank nope rotary value_width interleaved"),
    ]


class Indexer(ctypes.Structure):
    _fields_ = [
        *_fields(Matrix, "wq wk"),
        *_fields(_pointer, "norm norm_bias weights"),
        *_fields(_real, "eps"),
        *_fields(_size, "heads width top_k"),
    ]


class ChannelMixer(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm"),
        *_fields(_real, "norm_eps"),
        *_fields(_pointer, "router bias table"),
        *_fields(_size, "vocabulary experts top_k groups best_groups group_top scoring normalises"),
        *_fields(_real, "weight_scale"),
        *_fields(Matrix, "gate_up down"),
        *_fields(_size, "inner"),
        *_fields(Matrix, "shared_gate shared_up shared_down"),
        *_fields(_size, "shared_inner"),
        *_fields(_real, "limit"),
    ]


class CompressedAttention(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "norm q_norm kv_norm sinks"),
        *_fields(Matrix, "q_a q_b kv o_a o_b"),
        *_fields(_real, "norm_eps q_eps kv_eps head_eps scale"),
        *_fields(_size, "heads q_rank head rotary window groups out_rank"),
        *_fields(Matrix, "values gates"),
        *_fields(_size, "contribution"),
        *_fields(Matrix, "index_values index_gates"),
        *_fields(_size, "index_contribution"),
    ]


class Layer(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "width"),
        ("attention", LatentAttention),
        ("compressed", CompressedAttention),
        ("indexer", Indexer),
        ("token_connection", Connection),
        ("channels", ChannelMixer),
        ("connection", Connection),
    ]


class Cache(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "latents"),
        *_fields(_size, "latents_stride"),
        *_fields(_pointer, "index_keys"),
        *_fields(_size, "index_stride length"),
    ]


class Memory(ctypes.Structure):
    _fields_ = [
        *_fields(_pointer, "window"),
        *_fields(_size, "window_stride window_count"),
        *_fields(_pointer, "window_places"),
        *_fields(_size, "window_places_stride"),
        *_fields(_pointer, "entries index_entries"),
        *_fields(_size, "entries_stride index_stride count"),
        *_fields(_pointer, "entry_places"),
        *_fields(_size, "entry_places_stride"),
    ]


class Between(ctypes.Structure):
    _fields_ = _fields(_pointer, "x post residual queries latent")


class Step(ctypes.Structure):
    _fields_ = [
        *_fields(_size, "batch tokens"),
        *_fields(_pointer, "cos sin"),
        *_fields(_size, "positions"),
        *_fields(_pointer, "seen"),
        *_fields(_size, "seen_batch seen_query"),
        *_fields(_pointer, "real ids"),
        *_fields(_size, "threads first"),
    ]


MIRRORED: tuple[type[ctypes.Structure], ...] = (
    *(Matrix, Connection, LatentAttention, Indexer, ChannelMixer, CompressedAttention),
    *(Layer, Cache, Memory, Between, Step),
)
# Raised, here and in kernels.cpp, when a field or an argument gets another meaning that no size tells.
VERSION = 1
