"""The process in which chat templates of others are rendered (`chat_templates`): a line of JSON in, a line out.

The system ends it if a template takes too long (SIGALRM, also within one long operation of C code), and memory beyond
the limit raises MemoryError, or ends it as well.
"""

import json
import os
import sys

MOST_SECONDS = 5
MOST_BYTES = 2 * 10**9


def main() -> None:
    """Answers requests `[template, messages, variables]` until the input ends."""
    # The interpreter's standard output is for answers alone.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin:
        template, messages, variables = json.loads(line)
        _alarm(MOST_SECONDS)
        try:
            (text,), _ = render_jinja_template([messages], chat_template=template, **variables)
            answer: dict[str, object] = {"characters": len(text)}
        except RecursionError:
            answer = {"error": "it calls itself too often"}
        except MemoryError:
            answer = {"error": f"it takes more than {MOST_BYTES / 1e9:.0f} GB of memory"}
        except Exception as error:
            first = next(iter(str(error)[:1000].splitlines()), "")
            answer = {"error": first if type(error).__name__ == "TemplateError" else f"{type(error).__name__}: {first}"}
        _alarm(0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _alarm(seconds: int) -> None:
    import signal

    if hasattr(signal, "alarm"):
        signal.alarm(seconds)  # nobody handles it, so it ends the process


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (MOST_BYTES, MOST_BYTES))
    except (ImportError, OSError, ValueError):
        return  # another system; the time is limited all the same


if __name__ == "__main__":
    main()
