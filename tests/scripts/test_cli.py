"""The command line's manners: help that costs nothing, exit codes, one-line errors; the same for every verb."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from fathom.scripts import cli
from fathom.training.errors import UserError

SCRIPTS = Path(cli.__file__).parent


def fathom(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "fathom", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_verb():
    process = fathom("--help")
    assert (process.returncode, process.stderr) == (0, "")
    for verb in cli.VERBS:
        assert f"\n  {verb} " in process.stdout
    assert fathom().stdout == process.stdout


def test_version():
    from fathom import __version__

    assert fathom("--version").stdout == f"fathom {__version__}\n"


def test_unknown_verb_names_the_nearest():
    process = fathom("pretrian")
    assert process.returncode == 2
    assert process.stderr == "fathom: error: unknown verb 'pretrian'; did you mean pretrain? (see fathom --help)\n"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("too deep: 7 > 6"), 2, "fathom dive: error: too deep: 7 > 6\n"),
        (KeyboardInterrupt(), 130, "fathom dive: interrupted\n"),
    ],
)
def test_exceptions_become_exit_codes(raised, code, line, capsys):
    def main(argv):
        raise raised

    assert cli.run("dive", main, []) == code
    assert capsys.readouterr().err == line


def test_a_mistake_of_ours_keeps_its_traceback():
    def main(argv):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        cli.run("dive", main, [])


def test_processes_end_their_group_before_python_does(tmp_path):
    """Else gloo's threads now and then abort a process that is done (seldom with one process, so it is asked for)."""
    script = tmp_path / "verb.py"
    script.write_text(
        "import atexit, sys\n"
        "import torch\n"
        "import torch.distributed as dist\n"
        "from fathom.scripts import cli\n"
        "def main(argv):\n"
        "    dist.init_process_group('gloo', init_method=f'file://{argv[0]}', rank=0, world_size=1)\n"
        "    dist.all_reduce(torch.zeros(1))\n"
        "    return 0\n"
        "atexit.register(lambda: print('at exit', dist.is_initialized()))\n"
        "code = cli.run('sum', main, sys.argv[1:])\n"
        "print('after the verb', dist.is_initialized())\n"
        "sys.exit(code)\n"
    )
    command = [sys.executable, str(script), str(tmp_path / "store")]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (process.returncode, process.stdout) == (0, "after the verb True\nat exit False\n"), process.stderr


def test_each_verb_is_a_file_and_each_file_a_verb():
    files = {path.stem for path in SCRIPTS.glob("*.py")} - {"__init__", "cli", "arguments", "refusals"}
    assert files == set(cli.VERBS)


@pytest.mark.parametrize("verb", cli.VERBS)
def test_verbs_can_be_started_as_modules(verb: str):
    """`torchrun -m fathom.scripts.VERB` must have the manners of `fathom VERB`: the file ends in the same call."""
    tree = ast.parse((SCRIPTS / f"{verb}.py").read_text(encoding="utf-8"))
    last = ast.unparse(tree.body[-1])
    assert last == f"if __name__ == '__main__':\n    sys.exit(run('{verb}', main, sys.argv[1:]))"


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_and_bad_options_of_every_verb(verb: str):
    shown = fathom(verb, "--help")
    assert shown.returncode == 0, shown.stderr
    assert f"usage: fathom {verb} " in shown.stdout
    refused = fathom(verb, "--no_such_option", "1")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"fathom {verb}: error: ")
    assert "Traceback" not in refused.stderr
