"""The page `docs/generations.md` and its Chinese twin, as Markdown.

Every number in a table is counted from the presets and every line of code looked up, so that the page is right when it
is written.
"""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...modeling.cache_size import cache_bytes_per_token, multi_head_cache_numbers, released_cache_bytes_per_token
from ...modeling.configuration_fathom import FathomConfig
from ...modeling.decoder_layer import FathomDecoderLayer
from ...modeling.modeling_fathom import FathomForCausalLM
from ...modeling.presets import OFFICIAL
from ...training.inspection import layer_runs
from ..inspect import amount
from .pictures import PICTURES, Say, speaker
from .texts import GENERATION_TEXTS

ROOT = Path(__file__).resolve().parents[2]
PAGES = {False: "generations.md", True: "generations.zh-CN.md"}


def files() -> dict[str, str]:
    """Contents of all files, by their name below `docs`."""
    contents = {}
    for chinese, name in PAGES.items():
        say = speaker(chinese)
        contents[name] = page(say)
        contents |= {_picture_file(picture, say): draw(say).render() for picture, draw in PICTURES.items()}
    return contents


def page(say: Say) -> str:
    """The page in one language, as Markdown."""
    sections = [
        say("# What each generation changed", "# 每一代改变了什么"),
        say(
            "English | [中文](generations.zh-CN.md)",
            "[English](generations.md) | 中文",
        ),
        say(
            "A language model turns tokens into embeddings, sends them through layers of attention and feed-forward "
            "network, and scores the next token. From the plain transformer to V4, DeepSeek changed each of these "
            "parts in turn. In Fathom a generation is a choice on three axes: how tokens mix (attention), how channels "
            "mix (feed-forward), and how the residual stream is carried between them. One decoder layer serves all "
            f"generations: {_link(FathomDecoderLayer)}.",
            "语言模型把词元变成嵌入，送过若干层注意力与前馈网络，再给下一个词元打分。从经典 Transformer 到 V4，"
            "DeepSeek 依次改变了其中每一部分。在 Fathom 中，一代就是三个轴上的选择：词元怎样混合（注意力）、通道怎样"
            f"混合（前馈）、残差流怎样在它们之间传递。所有世代共用同一个解码层：{_link(FathomDecoderLayer)}。",
        ),
        overview(say),
        say("## Tokens mix: attention", "## 词元的混合：注意力"),
        _picture("token-mixing", say),
        say("## Channels mix: feed-forward and experts", "## 通道的混合：前馈与专家"),
        _picture("channel-mixing", say),
        say("## The residual stream", "## 残差流"),
        _picture("residual", say),
        say("## Drafting: multi-token prediction", "## 起草：多词元预测"),
        _picture("drafting", say),
        *(_section(generation, say) for generation in GENERATION_TEXTS),
        say("## How it was counted", "## 怎样计数"),
        say(
            "Parameters are counted on the meta device, without MTP layers, which stand in a column of their own. "
            "Active are those that one token uses. From V2 on DeepSeek's published figure leaves out the input "
            "embedding, in which a row is looked up and nothing multiplied (V3: 36.6 B, printed as 37 B); "
            "DeepSeekMoE's does not. V2-Lite's 2.4 B are 2.45 B cut off, V4-Pro's 1.6 T are 1.57 T rounded to two "
            "digits. Cache bytes are those that every further token adds in all layers, in bf16 and in the number "
            "formats of the releases, V3.2 and V4 partly FP8 and FP4; MHA is what plain multi-head attention of the "
            "same layers and heads would keep in bf16. This page is written by `python -m fathom.scripts.generations`.",
            "参数在 meta 设备上计数，不含单列的 MTP 层。激活参数是一个词元用到的参数。自 V2 起，DeepSeek 公布的数字不"
            "含输入嵌入，因为那里只查一行，不做乘法（V3：36.6 B，公布为 37 B）；DeepSeekMoE 的数字包含它。V2-Lite 的 "
            "2.4 B 是 2.45 B 截断，V4-Pro 的 1.6 T 是 1.57 T 取两位数字。缓存字节数是每多一个词元在所有层中增加的字"
            "节，分别按 bf16 和发布版本的数值格式（V3.2 与 V4 部分为 FP8、FP4）；MHA 一列是相同层数和头数的普通多头注"
            "意力在 bf16 下要保存的字节。本页由 `python -m fathom.scripts.generations` 写出。",
        ),
    ]
    return "\n\n".join(sections) + "\n"


def overview(say: Say) -> str:
    """One line per generation: its kinds of layers in all sizes, and the numbers of its largest release."""
    header = (
        say("generation", "世代"),
        say("tokens mix by", "词元混合"),
        say("channels mix by", "通道混合"),
        say("experts scored by", "专家打分"),
        say("residual streams", "残差流"),
        say("MTP layers", "MTP 层"),
        say("parameters", "参数"),
        say("cache per token", "每词元缓存"),
    )
    rows = []
    for generation in GENERATION_TEXTS:
        names = _presets(generation)
        configs = [FathomConfig.preset(name) for name in names]
        config = configs[-1]
        routed = config.uses("moe")
        rows.append(
            (
                f"[{generation}](#{generation.replace('.', '')})",
                ", ".join(
                    dict.fromkeys(each.token_mixer(i) for each in configs for i in range(each.num_hidden_layers))
                ),
                ", ".join(
                    dict.fromkeys(each.channel_mixer(i) for each in configs for i in range(each.num_hidden_layers))
                ),
                f"{config.scoring_func}, {config.topk_method}" if routed else "",
                str(config.hc_mult),
                str(config.num_nextn_predict_layers or ""),
                f"{amount(_counts(names[-1])['total'])} ({_label(names[-1])})",
                say(
                    f"{released_cache_bytes_per_token(config):,.0f} bytes",
                    f"{released_cache_bytes_per_token(config):,.0f} 字节",
                ),
            )
        )
    return _table(header, rows)


def _section(generation: str, say: Say) -> str:
    texts = GENERATION_TEXTS[generation]
    config = FathomConfig.preset(_presets(generation)[-1])
    anchor = f'<a id="{generation.replace(".", "")}"></a>'
    sources = "; ".join(
        say(
            f"{source.name}, [arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv}), "
            f"section{'s' if ',' in source.sections else ''} {source.sections}",
            f"{source.name}，[arXiv {source.arxiv}](https://arxiv.org/abs/{source.arxiv})，第 {source.sections} 节",
        )
        for source in texts.sources
    )
    return "\n\n".join(
        [
            f"{anchor}\n\n## {say(*texts.title)}",
            say(*texts.text).format(c=config),
            # As a block of code: in $$ GitHub's Markdown takes `\,` and the like for escapes of its own.
            *(f"```math\n{formula}\n```" for formula in texts.formulas),
            say(f"Read: {sources}.", f"原文：{sources}。"),
            _size_table(generation, say),
            _code_table(texts.code, say),
        ]
    )


def _size_table(generation: str, say: Say) -> str:
    header = (
        say("size", "规模"),
        say("layers", "层"),
        say("parameters", "参数"),
        say("active", "激活"),
        say("active without input embedding", "激活，不含输入嵌入"),
        "MTP",
        say("cache bytes per token, bf16", "每词元缓存字节，bf16"),
        say("released formats", "发布格式"),
        "MHA",
    )
    rows = []
    for name in _presets(generation):
        config, counts = FathomConfig.preset(name), _counts(name)
        rows.append(
            (
                f"`{_label(name)}`",
                ", ".join(map(str, layer_runs(config, range(config.num_hidden_layers)))),
                amount(counts["total"]),
                amount(counts["active"]),
                amount(counts["active"] - config.vocab_size * config.hidden_size),
                amount(counts["mtp"]) if counts["mtp"] else "",
                f"{cache_bytes_per_token(config):,.0f}",
                f"{released_cache_bytes_per_token(config):,.0f}",
                f"{2 * multi_head_cache_numbers(config):,}",
            )
        )
    return _table(header, rows)


def _code_table(code: Iterable[Any], say: Say) -> str:
    rows = [(say(each.english, each.chinese), _link(each.what), str(len(_lines(each.what)))) for each in code]
    return _table((say("what", "内容"), say("where", "位置"), say("lines", "行数")), rows)


def _lines(what: Callable) -> list[str]:
    return inspect.getsourcelines(what)[0]


def _link(what: Callable) -> str:
    """A link to the lines of a class or function, relative to `docs`."""
    lines, first = inspect.getsourcelines(what)
    file = Path(inspect.getfile(inspect.unwrap(what))).resolve().relative_to(ROOT).as_posix()
    last = first + len(lines) - 1
    return f"[`{what.__qualname__}`](../{file}#L{first}-L{last})"


def _presets(generation: str) -> list[str]:
    """The nano preset, which has the generation's name, and the official models, the largest last."""
    return [generation, *(name for name, fields in OFFICIAL.items() if fields["generation"] == generation)]


def _label(name: str) -> str:
    return name if name in OFFICIAL else f"{name}-nano"


@cache
def _counts(name: str) -> dict[str, int]:
    with torch.device("meta"):
        return FathomForCausalLM(FathomConfig.preset(name)).parameter_counts()


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))


def _picture_file(name: str, say: Say) -> str:
    return f"generations/{name}{say('', '.zh-CN')}.svg"


def _picture(name: str, say: Say) -> str:
    picture = PICTURES[name](say)
    return f"![{picture.title}{say('. ', '。')}{picture.description}]({_picture_file(name, say)})"
