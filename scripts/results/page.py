"""`docs/results/README.md` and its Chinese twin: what was published, what the runs show, and how to repeat them.

Every figure and every verdict is computed from the JSON files of the runs.
"""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...training.ablation import BATCH_ROWS, HELDOUT_ROWS, SEQUENCE_LENGTH, Spread, read_result, spread
from ...training.checkpoints import staged_directory
from ...training.experiments import EXPERIMENTS, FIGURES, VARIANTS, Experiment, Finding
from .plot import plot, title_of
from .words import Results, Say, number, speaker

PAGES = {False: "README.md", True: "README.zh-CN.md"}


def write_results(folder: Path) -> None:
    """Writes both pages and the plots of all experiments that have a run of every variant in `folder`."""
    results = read_results(folder / "runs")
    with staged_directory(folder) as staging:
        for chinese, file in PAGES.items():
            say = speaker(chinese)
            (staging / file).write_text(page(results, say), encoding="utf-8")
            for name in complete(results):
                (staging / picture_file(name, say)).write_text(plot(name, results, say).render(), encoding="utf-8")


def read_results(folder: Path) -> Results:
    """All runs there are, by variant, in the order of their seeds."""
    results: Results = {}
    for name in VARIANTS:
        results[name] = []
        while (result := read_result(folder, name, len(results[name]))) is not None:
            results[name].append(result)
    return results


def complete(results: Results) -> list[str]:
    """The experiments that have a run of every variant."""
    return [name for name, experiment in EXPERIMENTS.items() if all(results[each] for each in experiment.variants)]


def page(results: Results, say: Say) -> str:
    """The page in one language, as Markdown."""
    names = complete(results)
    everything = [result for runs in results.values() for result in runs]
    sections = [
        say("# What reproduces at this size", "# 在这个规模上能复现什么"),
        say("English | [中文](README.zh-CN.md)", "[English](README.md) | 中文"),
        introduction(everything, say),
        say("## Published orderings", "## 已发表的次序"),
        say(
            "An ordering reproduces where the two means differ in its direction by more than twice the standard "
            "deviation of their difference over the seeds, and does not where they differ as much the other way. "
            "Everything in between is open: the runs are too few, or too small, to tell. With three seeds the "
            "deviations are rough themselves, so a difference just above the limit is weak evidence. A side with "
            "several variants stands for the best of them.",
            "若两个均值按所述方向之差超过其差值跨种子标准差的两倍，则该次序复现；若反方向之差同样大，则不复现；介于其间为"
            "未定：运行太少或规模太小，不足以判断。只有三个种子时，标准差本身也很粗略，刚过界限的差异只是弱证据。一侧有多"
            "个变体时，取其中最好的一个。",
        ),
        verdicts(names, results, say),
        *(section(name, results, say) for name in names),
    ]
    if missing := [name for name in EXPERIMENTS if name not in names]:
        sections.append(say(f"Not run yet: {', '.join(missing)}.", f"尚未运行：{'、'.join(missing)}。"))
    sections += [say("## The runs", "## 运行"), provenance(everything, say)]
    return "\n\n".join(sections) + "\n"


def introduction(everything: list[dict[str, Any]], say: Say) -> str:
    if not everything:
        return say("Nothing has been run yet: `fathom ablate`.", "尚未运行：`fathom ablate`。")
    setup = everything[0]["setup"]
    tokens, steps = setup["tokens_per_step"] * setup["steps"], setup["steps"]
    base = next((result["figures"] for result in everything if result["variant"] == "base"), everything[0]["figures"])
    size, active = base["parameters_total"] / 1e6, base["parameters_active"] / 1e6
    shape = f"{BATCH_ROWS} x {SEQUENCE_LENGTH}"
    return say(
        f"Small matched experiments on findings of DeepSeek's papers, by `fathom ablate`. Each model has about "
        f"{size:.1f} M parameters ({active:.1f} M active) and is trained on {tokens / 1e3:,.0f} thousand tokens of the "
        f"Python standard library ({steps} steps of {shape} tokens, vocabulary {setup['vocab_size']}), in about half "
        f"a minute on one CPU core. The papers' models are a thousand to a million times larger and see a million "
        f"times as much text. What reproduces here is cheap to see for yourself; what does not reproduce here is not "
        f"thereby refuted. Bits per byte are measured on {HELDOUT_ROWS} rows of held-out modules; ± is two standard "
        f"deviations over the seeds.",
        f"针对 DeepSeek 论文结论的小型对照实验，由 `fathom ablate` 运行。每个模型约 {size:.1f} M 参数（激活 "
        f"{active:.1f} M），在 Python 标准库的 {tokens / 1e3:,.0f} 千个词元上训练（{steps} 步，每步 {shape} 个词元，"
        f"词表 {setup['vocab_size']}），单个 CPU 核心上约半分钟。论文中的模型大一千到一百万倍，文本多一百万倍。"
        f"在这里复现的，人人可以低价亲见；在这里没有复现的，并不因此被否定。每字节比特在留出模块的 {HELDOUT_ROWS} 行上"
        f"测量；± 为跨种子的两倍标准差。",
    )


def verdicts(names: Iterable[str], results: Results, say: Say) -> str:
    """One line per published ordering."""
    words = {
        "shown": say("**reproduces**", "**复现**"),
        "reversed": say("**does not reproduce**", "**不复现**"),
        "open": say("open", "未定"),
        "unknown": say("one seed only", "仅一个种子"),
    }
    rows = []
    for name in names:
        for finding in EXPERIMENTS[name].findings:
            judged = finding.judge(results)
            if judged is None:
                continue
            outcome, smaller, larger = judged
            rows.append(
                (
                    f"[{name}](#{name})",
                    say(*finding.words),
                    f"[{finding.source.arxiv}](https://arxiv.org/abs/{finding.source.arxiv}), "
                    f"{say(*finding.source.where)}",
                    words[outcome],
                    comparison(finding, smaller, larger),
                )
            )
    header = (
        say("experiment", "实验"),
        say("published", "已发表"),
        "arXiv",
        say("here", "此处"),
        say("smaller expected, larger expected", "应较小者，应较大者"),
    )
    return table(header, rows)


def comparison(finding: Finding, smaller: Spread, larger: Spread) -> str:
    """Both sides of a finding as numbers."""
    figure = next(side.figure for side in (finding.smaller, finding.larger) if not isinstance(side, float))
    digits = FIGURES[figure].digits
    return ", ".join(cell(side, digits) for side in (smaller, larger))


def section(name: str, results: Results, say: Say) -> str:
    """What one experiment compares, its plot, its table and its command."""
    experiment = EXPERIMENTS[name]
    runs = [result for variant in experiment.variants for result in results[variant]]
    seeds = min(len(results[variant]) for variant in experiment.variants)
    command = f"fathom ablate {name} --seeds {seeds} --steps {runs[0]['setup']['steps']}"
    picture = plot(name, results, say)
    return "\n\n".join(
        (
            f'<a id="{name}"></a>\n\n## {picture.title}',
            say(*experiment.matched),
            f"![{picture.title}{say('. ', '。')}{picture.description}]({picture_file(name, say)})",
            variants_table(experiment, results, say) if len(experiment.variants) > 1 else one(experiment, results, say),
            f"```bash\n{command}\n```",
        )
    )


def variants_table(experiment: Experiment, results: Results, say: Say) -> str:
    """A row per variant."""
    header = (
        say("variant", "变体"),
        *(title_of(figure, say) for figure in experiment.figures),
        say("parameters, total / active", "参数，总 / 激活"),
        say("seeds", "种子"),
    )
    rows = []
    for variant, label in experiment.variants.items():
        runs = results[variant]
        cells = [cell(spread(runs, figure), FIGURES[figure].digits) for figure in experiment.figures]
        sizes = " / ".join(f"{runs[0]['figures'][f'parameters_{kind}']:,}" for kind in ("total", "active"))
        rows.append((say(*label), *cells, sizes, str(len(runs))))
    return table(header, rows)


def one(experiment: Experiment, results: Results, say: Say) -> str:
    """A row per figure, for an experiment with one variant."""
    runs = results[next(iter(experiment.variants))]
    header = (say("figure", "指标"), say("value", "值"), say("seeds", "种子"))
    rows = [
        (title_of(figure, say), cell(spread(runs, figure), FIGURES[figure].digits), str(len(runs)))
        for figure in experiment.figures
    ]
    return table(header, rows)


def cell(value: Spread | None, digits: int) -> str:
    """`mean ± two standard deviations`, the mean alone where it does not vary, nothing where there is no value."""
    if value is None:
        return ""
    mean = number(value.mean, digits)
    return mean if math.isnan(value.deviation) or not value.deviation else f"{mean} ± {2 * value.deviation:.{digits}f}"


def provenance(everything: list[dict[str, Any]], say: Say) -> str:
    """Which code, on what, made the runs."""
    said: dict[str, list[str]] = {"commit": [], "command": [], "python": [], "torch": [], "device": [], "threads": []}
    for result in everything:
        for key, seen in said.items():
            if (value := result["origin"].get(key)) and value not in seen:
                seen.append(value)
    corpora = sorted({result["setup"]["corpus"] for result in everything})
    count = len(everything)
    lines = [
        say(
            f"{count} runs. Each is a file in [`runs`](runs): setup, figures and loss curve. "
            f"Runs that are there are not repeated, so the same command goes on after an interruption; with another "
            f"`--output` it repeats all.",
            f"共 {count} 次运行。每次运行是 [`runs`](runs) 中的一个文件，含设置、指标与损失曲线。"
            f"已有的运行不会重复，因此中断后用同一命令继续；换一个 `--output` 则全部重做。",
        ),
        table(
            (say("what", "项目"), say("value", "值")),
            [
                *((key, ", ".join(f"`{value}`" for value in seen)) for key, seen in said.items()),
                (say("text", "文本"), ", ".join(corpora)),
            ],
        ),
    ]
    return "\n\n".join(lines)


def picture_file(name: str, say: Say) -> str:
    return f"{name}{say('', '.zh-CN')}.svg"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows))
