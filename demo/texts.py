"""Every word of the page, in English and Chinese.

Labels are translated by Gradio in the browser (`gr.I18n`); what the server writes later (numbers, errors) is chosen
here by the browser's `Accept-Language`. Both follow the browser's language settings.
"""

from typing import Any

EN = {
    "settings": "Settings",
    "checkpoint": "Model",
    "checkpoint_info": "Checkpoints found on this machine. One is in memory at a time.",
    "untrained_choice": "untrained {generation} nano (random weights)",
    "system_prompt": "System prompt",
    "thinking": "Think first",
    "thinking_info": "Let the model reason before it answers; helps only a model that was trained to.",
    "sampling": "Sampling",
    "max_new_tokens": "Tokens per answer",
    "temperature": "Temperature (0: greedy)",
    "top_p": "Top-p",
    "top_k": "Top-k (0: off)",
    "repetition_penalty": "Repetition penalty",
    "conversation": "Conversation",
    "message": "Write a message",
    "welcome": "Ask about a Python function or class.",
    "parameters": "{total} parameters",
    "active": "{active} active per token",
    "generation": "generation {generation}",
    "untrained": "Untrained: the weights are random, so the answers are noise.",
    "waiting": "waiting for the model",
    "reading": "reading {prompt} prompt tokens",
    "tokens": "{tokens} tokens",
    "speed": "{speed} tokens/s",
    "first_token": "first token after {seconds} s",
    "context": "context {used} of {context}",
    "eos": "ended by itself",
    "length": "cut at {limit} tokens",
    "clipped": "cut at {limit} tokens, where the context of {context} is full",
    "stopped": "stopped",
    "empty": "the model ended its turn without a word",
    "thinking_title": "Thinking",
    "thought_title": "Thought",
}

ZH = {
    "settings": "设置",
    "checkpoint": "模型",
    "checkpoint_info": "本机上找到的检查点。内存中同时只有一个模型。",
    "untrained_choice": "未训练的 {generation} nano（随机权重）",
    "system_prompt": "系统提示词",
    "thinking": "先思考",
    "thinking_info": "让模型在回答之前先推理；只对为此训练过的模型有用。",
    "sampling": "采样",
    "max_new_tokens": "每次回答的最大词元数",
    "temperature": "温度（0：贪心）",
    "top_p": "Top-p",
    "top_k": "Top-k（0：关闭）",
    "repetition_penalty": "重复惩罚",
    "conversation": "对话",
    "message": "输入消息",
    "welcome": "问一个 Python 函数或类。",
    "parameters": "{total} 参数",
    "active": "每个词元激活 {active}",
    "generation": "{generation} 代",
    "untrained": "未训练：权重是随机的，回答只是噪声。",
    "waiting": "正在等待模型",
    "reading": "正在读取 {prompt} 个提示词元",
    "tokens": "{tokens} 个词元",
    "speed": "{speed} 词元/秒",
    "first_token": "首个词元用时 {seconds} 秒",
    "context": "上下文 {used} / {context}",
    "eos": "自行结束",
    "length": "在 {limit} 个词元处截断",
    "clipped": "在 {limit} 个词元处截断：上下文 {context} 已满",
    "stopped": "已停止",
    "empty": "模型没有输出就结束了回答",
    "thinking_title": "思考中",
    "thought_title": "已思考",
}

# Gradio has these two Chinese locales; a browser set to either reads the same text.
LOCALES = {"en": EN, "zh": ZH, "zh-CN": ZH, "zh-TW": ZH}

EXAMPLES = (
    "What does `textwrap.dedent(text)` do?",
    "What does `os.path.join(a, *p)` do?",
    "What is `collections.Counter` for?",
)


def language_of(accept_language: str | None) -> str:
    """`zh` where a browser's `Accept-Language` header begins with a Chinese locale, else `en`."""
    return "zh" if (accept_language or "").lower().startswith("zh") else "en"


def say(language: str, key: str, **values: Any) -> str:
    """A text with its values filled in, e.g. `say("en", "tokens", tokens=12)` is `"12 tokens"`."""
    return LOCALES[language][key].format(**values)
