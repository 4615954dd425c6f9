"""transformers' Auto classes read Fathom's folders after `import fathom` alone, in whatever order the two are imported.

Every case is a fresh process without a terminal, where a question whether to run custom code is an error.
"""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

FIRST_LINES = {
    "before": "import fathom",
    "after transformers": "import transformers, fathom",
    "after its config classes": "from transformers import AutoConfig; import fathom",
    "after its model classes": "from transformers import AutoModelForCausalLM; import fathom",
}
USES = {
    "model": "from transformers import AutoModelForCausalLM as A; print(type(A.from_pretrained(folder)).__name__)",
    "config": "from transformers import AutoConfig as A; print(type(A.from_pretrained(folder)).__name__)",
    "tokenizer": "from transformers import AutoTokenizer as A; print(A.from_pretrained(folder).bos_token_id)",
    "base": "from transformers import AutoModel as A; print(type(A.from_pretrained(folder)).__name__)",
    "classifier": """from transformers import AutoModelForSequenceClassification as A
print(type(A.from_pretrained(folder)).__name__)""",
    "tagger": """from transformers import AutoModelForTokenClassification as A
print(type(A.from_pretrained(folder)).__name__)""",
    "pipeline": """from transformers import pipeline
print(len(pipeline("text-generation", folder)("def", max_new_tokens=2, return_full_text=False)))""",
    "from a config": """from transformers import AutoConfig, AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))).__name__)""",
}
EXPECTED = {
    "model": "FathomForCausalLM",
    "config": "FathomConfig",
    "tokenizer": "0",
    "base": "FathomModel",
    "classifier": "FathomForSequenceClassification",
    "tagger": "FathomForTokenClassification",
    "pipeline": "1",
    "from a config": "FathomForCausalLM",
}


def printed(code: str, *args: str) -> list[str]:
    command = [sys.executable, "-c", code, *args]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.split()


@pytest.mark.parametrize("order", FIRST_LINES)
def test_every_auto_class(order: str, tiny_checkpoint: Path):
    code = "\n".join([FIRST_LINES[order], "import sys", "folder = sys.argv[1]", *USES.values()])
    assert printed(code, str(tiny_checkpoint)) == list(EXPECTED.values())


@pytest.mark.parametrize("use", ["tokenizer", "pipeline"])
def test_each_alone_is_enough(use: str, tiny_checkpoint: Path):
    code = f"import fathom, sys\nfolder = sys.argv[1]\n{USES[use]}"
    assert printed(code, str(tiny_checkpoint)) == [EXPECTED[use]]


@pytest.mark.parametrize("order", ["before", "after transformers"])
def test_it_imports_no_torch(order: str):
    code = f"{FIRST_LINES[order]}\nimport sys; print('torch' in sys.modules, 'transformers.models.auto' in sys.modules)"
    assert printed(code) == ["False", "False"]


def test_an_unpickled_config_makes_models(tmp_path: Path):
    """As in a spawned worker, which imports what the pickle names and nothing else."""
    from fathom import FathomConfig

    file = tmp_path / "config.pkl"
    file.write_bytes(pickle.dumps(FathomConfig.preset("v3", vocab_size=99)))
    code = """
import pickle, sys
config = pickle.load(open(sys.argv[1], "rb"))
from transformers import AutoModel, AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_config(config)).__name__, type(AutoModel.from_config(config)).__name__)
"""
    assert printed(code, str(file)) == ["FathomForCausalLM", "FathomModel"]


def test_trusted_code_of_the_folder_is_not_run_beside_the_package(tiny_checkpoint: Path):
    code = """
import fathom, sys
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)).__module__)
"""
    assert printed(code, str(tiny_checkpoint)) == ["fathom.modeling.modeling_fathom"]


def test_stock_models_are_untouched():
    code = """
import fathom
from transformers import AutoModelForCausalLM, DeepseekV3Config
small = {"num_hidden_layers": 1, "hidden_size": 16, "vocab_size": 9, "n_routed_experts": 8, "intermediate_size": 8}
print(type(AutoModelForCausalLM.from_config(DeepseekV3Config(**small, moe_intermediate_size=8))).__module__)
"""
    assert printed(code) == ["transformers.models.deepseek_v3.modeling_deepseek_v3"]


def test_transformers_modules_keep_their_loaders():
    code = """
import fathom, inspect
from transformers.models.auto import configuration_auto, modeling_auto
for module in (configuration_auto, modeling_auto):
    print(type(module.__loader__).__name__, len(inspect.getsource(module)) > 1000)
import importlib
importlib.reload(fathom)
importlib.reload(configuration_auto)
print(configuration_auto.CONFIG_MAPPING_NAMES["fathom"])
"""
    assert printed(code) == [*["SourceFileLoader", "True"] * 2, "FathomConfig"]
