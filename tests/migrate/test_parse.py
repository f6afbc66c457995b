"""Three ways of writing a config are read alike, and what cannot be read is refused in one line."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from gspo_lightning.errors import UserError
from gspo_lightning.migrate import convert, parse_config
from gspo_lightning.migrate.__main__ import main
from gspo_lightning.migrate.parse import parse_lora, parse_unread


def test_the_call_of_grpo_config_is_found_among_other_configs():
    wanted = {"learning_rate": 1e-5, "num_generations": 8}
    call = "args = GRPOConfig(learning_rate=1e-5, num_generations=8)\n"
    for other in ("peft_config = LoraConfig(r=16, lora_alpha=32)\n", "bnb = BitsAndBytesConfig(load_in_4bit=True)\n"):
        assert parse_config(other + call) == parse_config(call + other) == wanted
    nested = "trainer = GRPOTrainer(peft_config=LoraConfig(r=16), args=trl.GRPOConfig(learning_rate=1e-5, num_generations=8))"
    assert parse_config(nested) == wanted
    assert parse_config(call.replace("GRPOConfig", "MyConfig")) == wanted


def test_three_ways_of_writing_give_the_same_keys():
    wanted = {"learning_rate": 5e-6, "report_to": "none", "beta": 0.0, "adam_beta2": 0.99}
    assert parse_config(json.dumps(wanted)) == wanted
    assert parse_config("learning_rate: 5e-6\nreport_to: none\nbeta: 0.0\nadam_beta2: 0.99\n") == wanted
    keywords = "learning_rate = 5e-6, # slow\nreport_to = 'none', beta = 0.0, adam_beta2 = 1 - 0.01,"
    assert parse_config(keywords) == wanted
    program = f"!pip install trl\nfrom trl import GRPOConfig\nrate = 5e-6\nargs = GRPOConfig({keywords.replace('5e-6', 'rate')})\n"
    assert parse_config(program) == wanted


REFUSED = {
    "code": ("GRPOConfig(output_dir=__import__('os').getcwd())", "output_dir=__import__('os').getcwd(): is not a literal"),
    "an unknown name": ("GRPOConfig(learning_rate=rate)", "rate is not assigned a literal above"),
    "a dictionary of keywords": ("GRPOConfig(**options, seed=1)", "without * and **"),
    "an unknown field": ("GRPOConfig(learning_rte=1)", "learning_rte: TRL 1.16.0's GRPOConfig has no such field"),
    "groups that do not fit": ("GRPOConfig(per_device_train_batch_size=6)", "not a multiple of num_generations=8"),
    "both batch settings": (
        "GRPOConfig(generation_batch_size=8, steps_per_generation=2)", "contradict each other with 1 rank ",
    ),
    "half a step per rollout": (
        "GRPOConfig(gradient_accumulation_steps=8, steps_per_generation=4)",
        "32 completions per rollout are not a multiple of the 64 of an optimizer step",
    ),
    "a step and a half per rollout": (
        "GRPOConfig(gradient_accumulation_steps=8, steps_per_generation=12)",
        "96 completions per rollout are not a multiple of the 64 of an optimizer step",
    ),
    "a step of half a group": (
        "GRPOConfig(per_device_train_batch_size=4, steps_per_generation=2, gradient_accumulation_steps=1)",
        "does not hold whole groups",
    ),
    "a number that is none": ("per_device_train_batch_size: auto", "'auto' is not a number; TRL's default is 8"),
    "no number of epochs": ("GRPOConfig(num_train_epochs=None)", "num_train_epochs=None is not a number"),
    "groups of none": ("GRPOConfig(num_generations=0)", "num_generations=0 must be at least 1"),
    "a mapping that is none": ("GRPOConfig(chat_template_kwargs='{x')", "chat_template_kwargs={x: neither a mapping nor"),
    "JSON of no mapping": ("GRPOConfig(lr_scheduler_kwargs='3')", "lr_scheduler_kwargs=3: neither a mapping nor"),
    "prose": ("this is not a config", "the config"),
    "nothing": ("", "the config has no keys"),
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_read_is_refused_in_one_line(text, message):
    with pytest.raises(UserError) as caught:
        convert(parse_config(text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[" * 100_000, "the config is nested too deeply, or contains itself"),
        ("a: &x [*x]", "the config is nested too deeply, or contains itself"),
        ("5", "the config is neither JSON, YAML nor Python: it is a value without a key"),
    ],
    ids=["deep", "endless", "a number"],
)
def test_what_no_config_looks_like_is_refused_in_one_line(text, line):
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        parse_config(text)


def test_standard_input_that_is_no_text_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    assert main(["-"]) == 2
    assert capsys.readouterr().err.startswith("error: -: cannot read the file ('utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize("key", ["num_train_epochs", "per_device_train_batch_size", "learning_rate"])
def test_a_number_of_hundreds_of_digits_is_one_line(key, tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(f"{key}: {'9' * 400}\n", encoding="utf-8")
    assert main([str(file)]) == 2
    assert capsys.readouterr().err == f"error: {key}: a whole number of 1329 bits is too large; correct it\n"
    lora = f"GRPOConfig(beta=0.0)\nLoraConfig(r={'9' * 400})\n"
    with pytest.raises(UserError, match=r"^r: a whole number of 1329 bits is too large"):
        convert(parse_config(lora), adapter=parse_lora(lora))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("lr = 1e-6\nargs = GRPOConfig(beta=lr)\nlr = 5.0", 1e-6),
        ("lr: float = 1e-6\nargs = GRPOConfig(beta=lr)", 1e-6),
        ("lr = 1e-6\nlr = float(os.environ['LR'])\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nlr *= 2\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nif fast:\n    lr = 1e-5\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nlr, b = 1, 2\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nif fast:\n    lr = 1e-5\n    args = GRPOConfig(beta=lr)", 1e-5),
        ("lr = 1e-6\nfor seed in seeds:\n    args = GRPOConfig(beta=lr)\n    lr = 1", None),
        ("lr = 1e-6\nfor lr in rates:\n    args = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nwith open('x') as lr:\n    args = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nfrom settings import lr\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\ndef main():\n    n = 2\n    args = GRPOConfig(beta=lr * n)", 2e-6),
        ("lr = 1e-6\ndef main(lr=1e-5):\n    args = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\ndef main():\n    args = GRPOConfig(beta=lr)\nlr = 1e-5\nmain()", None),
        ("lr = 1e-6\ndef reward(c):\n    lr = 3\n    for lr in c: pass\nargs = GRPOConfig(beta=lr)", 1e-6),
        ("lr = 1e-6\nrows = [lr for lr in open('x')]\nargs = GRPOConfig(beta=lr)", 1e-6),
        ("lr = 1e-6\nclass A:\n    lr = 3\n    def lr(self): pass\nargs = GRPOConfig(beta=lr)", 1e-6),
        ("lr = 1e-6\ndef main():\n    args = GRPOConfig(beta=lr)\ndef other(lr):\n    lr = 3\nmain()", 1e-6),
        ("lr = 1e-6\nclass A:\n    def main(self):\n        args = GRPOConfig(beta=lr)\ndef b():\n    lr = 3", 1e-6),
        ("lr = 1e-6\ndef main():\n    lr = 1e-5\n    args = GRPOConfig(beta=lr)\nlr = 2", 1e-5),
        ("def main():\n    global lr\n    lr = 1e-5\n    args = GRPOConfig(beta=lr)", 1e-5),
        ("lr = 1e-6\nargs = GRPOConfig(beta=lr)\ndef main():\n    global lr\n    lr = 1e-5", 1e-6),
        ("lr = 1e-6\ndef main():\n    global lr\n    lr = 1e-5\nmain()\nargs = GRPOConfig(beta=lr)", None),
        ("def main():\n    global lr\n    lr = 1e-5\nlr = 1e-6\nmain()\nargs = GRPOConfig(beta=lr)", None),
        (
            "lr = 1e-6\ndef main():\n    args = GRPOConfig(beta=lr)\ndef b():\n    global lr\n    lr = 3\nb()\nmain()",
            None,
        ),
        (
            "def main():\n    lr = 1e-6\n    def b():\n        nonlocal lr\n        lr = 3\n    b()\n"
            "    args = GRPOConfig(beta=lr)",
            None,
        ),
        ("lr = 1e-6\nclass A:\n    lr = 3\n    def main(self):\n        args = GRPOConfig(beta=lr)\n    lr = 4", None),
        ("lr = 1e-6\ndef lr(): pass\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nrows = [lr := row for row in open('x')]\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nargs = [GRPOConfig(beta=lr) for lr in rates]", None),
        ("lr = 1e-6\nmake = lambda lr: GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nmake = lambda: GRPOConfig(beta=lr)\nlr = 1e-5\nargs = make()", None),
        ("lr = 1e-6\nfrom settings import *\nargs = GRPOConfig(beta=lr)", None),
        ("from settings import *\nlr = 1e-6\ndef main():\n    args = GRPOConfig(beta=lr)", 1e-6),
        ("lr = 1e-6\ndef main():\n    args = GRPOConfig(beta=lr)\nfrom settings import *\nmain()", None),
        ("lr = 1e-6\ntry:\n    import peft\nexcept ImportError as lr:\n    pass\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nmatch x:\n    case [lr]:\n        pass\nargs = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nmatch x:\n    case [1, *lr]:\n        args = GRPOConfig(beta=lr)", None),
        ("lr = 1e-6\nmatch x:\n    case {'a': 1, **lr}:\n        args = GRPOConfig(beta=lr)", None),
    ],
)
def test_a_name_has_the_value_that_it_has_where_the_call_is_made_or_none(text, value):
    if value is not None:
        assert parse_config(text) == {"beta": value}
        return
    with pytest.raises(UserError, match="^beta=lr: lr is not assigned a literal above, or may be changed after that"):
        parse_config(text)


@pytest.mark.parametrize(
    ("before", "known"),
    [
        ("print('modules', t, len(t), f'{t}')\nif 'k' in t:\n    x = 1\n", True),
        ("u = ['k']\nu.append('v')\n", True),
        ("rows = [t for t in open('x')]\ndef f(t):\n    t.append('v')\n", True),
        ("def build():\n    t = []\n    def add():\n        t.append('v')\n", True),
        ("t.append('v')\n", False),
        ("t[0] = 'v'\n", False),
        ("t[:] = ['v']\n", False),
        ("del t[0]\n", False),
        ("add(t)\n", False),
        ("if wide:\n    t.append('v')\n", False),
        ("print(t.pop())\n", False),
        ("u = t\nu.append('v')\n", False),
        ("u = t\nu += ['v']\n", False),
        ("u = [t]\nu[0].append('v')\n", False),
        ("def f():\n    t.append('v')\nf()\n", False),
        ("class A:\n    t.append('v')\n    t = 3\n", False),
        ("class A:\n    t = []\n    def f(self):\n        t.append('v')\nA().f()\n", False),
    ],
)
def test_a_list_that_may_have_been_changed_before_the_call_is_not_read_as_it_was(before, known):
    texts = [f"t = ['q']\n{before}args = GRPOConfig(reward_weights=t)\nt.append('o')"]
    texts.append(f"t = ['q']\n{before}for i in x:\n    args = GRPOConfig(reward_weights=t)")
    texts.append(f"t = ['q']\n{before}def main():\n    args = GRPOConfig(reward_weights=t)\nmain()")
    texts.append(f"t = ['q']\ndef main():\n    args = GRPOConfig(reward_weights=t)\n{before}main()")
    for text in texts:
        if known:
            assert parse_config(text) == {"reward_weights": ["q"]}
            continue
        with pytest.raises(UserError, match=r"^reward_weights=t: t is not assigned a literal above, or may be changed"):
            parse_config(text)


def test_a_list_changed_by_a_function_above_it_or_in_a_loop_is_not_read_as_it_was():
    for text in (
        "def f():\n    t.append('v')\nt = ['q']\nf()\nargs = GRPOConfig(reward_weights=t)",
        "t = ['q']\nfor i in x:\n    args = GRPOConfig(reward_weights=t)\n    t.append('v')",
        "t = {'a': 1}\nwhile t.pop('a'):\n    args = GRPOConfig(reward_weights=t)",
        "t = (['q'],)\nt[0].append('v')\nargs = GRPOConfig(reward_weights=t)",
    ):
        with pytest.raises(UserError, match=r"^reward_weights=t: t is not assigned a literal above, or may be changed"):
            parse_config(text)
    assert parse_config("t = ['q']\nu = t\nargs = GRPOConfig(reward_weights=u)") == {"reward_weights": ["q"]}
    assert parse_config("t = 8\nf(t)\nargs = GRPOConfig(seed=t)") == {"seed": 8}


@pytest.mark.parametrize(
    "text",
    [
        "args = Namespace()\nargs.x = 3\nargs = GRPOConfig(seed=5)",
        "def load():\n    args = AutoConfig.from_pretrained('m')\n    args.x = 3\nargs = GRPOConfig(seed=5)",
        "args = GRPOConfig(seed=5)\ndef load():\n    args = AutoConfig.from_pretrained('m')\n    args.x = 3",
        "def main():\n    args = GRPOConfig(seed=5)\nargs = AutoConfig.from_pretrained('m')\nargs.x = 3",
        "args = GRPOConfig(seed=5)\ndef load(args):\n    args.x = 3",
        "args = GRPOConfig(seed=5)\nclass A:\n    args = B()\n    args.x = 3",
    ],
)
def test_another_object_of_the_same_name_is_no_change_of_the_config(text):
    assert parse_config(text) == {"seed": 5}


def test_a_config_is_found_among_those_of_other_libraries_and_two_of_unknown_kind_are_both_named():
    others = (
        "GenerationConfig(temperature=5)",
        "SFTConfig(max_steps=9)",
        "AutoConfig(hidden_size=8)",
        "PPOConfig(seed=1)",
    )
    for other in (*others, "GPTQConfig(bits=4)", "AdaLoraConfig(r=8)", "TorchAoConfig(quant_type='int4')"):
        assert parse_config(f"args = MyConfig(seed=5)\ng = {other}") == {"seed": 5}
    with pytest.raises(
        UserError, match=r"^MyConfig is called in line 2 and YourConfig in line 3; leave one of the calls"
    ):
        parse_config("import x\na = MyConfig(seed=5)\nb = x.YourConfig(temperature=5)")
    with pytest.raises(UserError, match=r"^MyConfig is called in lines 1 and 2; leave one of the calls in the text$"):
        parse_config("a = MyConfig(seed=5)\nb = MyConfig(seed=6)")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "args = GRPOConfig(beta=0.1)\nargs.beta = 0.2",
            "line 2: args.beta is set after the call of GRPOConfig; make it",
        ),
        (
            "!pip install trl\na = GRPOConfig(beta=0.1)\nif x:\n    a.seed += 1",
            "line 4: a.seed is set after the call of",
        ),
        ("a = GRPOConfig(beta=0.1); a.seed = 1", "line 1: a.seed is set after the call of"),
        ("a = GRPOConfig(beta=0.1)\ndef main():\n    a.seed = 1", "line 3: a.seed is set after the call of"),
        ("def f():\n    a.seed = 1\na = GRPOConfig(beta=0.1)\nf()", "line 2: a.seed is set after the call of"),
        (
            "def main():\n    global a\n    a = GRPOConfig(beta=0.1)\nmain()\na.seed = 1",
            "line 5: a.seed is set after the call of",
        ),
        (
            "class A:\n    def g(self):\n        self.a.seed = 1\n    def f(self):\n        self.a = GRPOConfig(beta=0.1)",
            "line 3: self.a.seed is set after the call of",
        ),
        (
            "if fast:\n    a = GRPOConfig(beta=0.1)\nelse:\n    a = GRPOConfig(beta=0.2)",
            "GRPOConfig is called in lines 2 and 4; leave one of the calls in the text",
        ),
        (
            "from trl import GRPOConfig, TrlParser\nlora = LoraConfig(r=8)\nargs = TrlParser(GRPOConfig).parse_args()",
            "there is no call of GRPOConfig with keyword arguments in the Python text; give the file,",
        ),
    ],
)
def test_settings_that_stand_elsewhere_than_in_one_call_are_refused(text, line):
    with pytest.raises(UserError) as refused:
        parse_config(text)
    assert str(refused.value).startswith(line)


def test_an_adapter_without_a_lora_config_is_refused_rather_than_left_out():
    made = "args = GRPOConfig(beta=0.1)\nmodel = FastLanguageModel.get_peft_model(model, r=32, lora_alpha=64)\n"
    with pytest.raises(UserError, match=r"^line 2: FastLanguageModel.get_peft_model adds an adapter, without which"):
        parse_lora(made)
    assert parse_lora(f"{made}lora = LoraConfig(r=32)") == {"r": 32}
    assert parse_lora("args = GRPOConfig(beta=0.1)\nmodel = get_peft_model(model, lora)") is None
    with pytest.raises(UserError, match=r"^LoraConfig is called in lines 1 and 2; leave one of the calls in the text"):
        parse_lora("a = LoraConfig(r=8)\nb = LoraConfig(r=16)\nargs = GRPOConfig(beta=0.1)")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("t = GRPOTrainer(args=GRPOConfig(beta=0.1))\nt.args.beta = 0.2", ["line 2: t.args.beta = 0.2"]),
        ("a = GRPOConfig(beta=0.1)\nsetattr(a, 'beta', 0.2)", ["line 2: setattr(a, 'beta', 0.2)"]),
        ("a = GRPOConfig(beta=0.1)\nobject.__setattr__(a, 'b', 1)", ["line 2: object.__setattr__(a, 'b', 1)"]),
        (
            "def tune(c):\n    c.beta = 1\na = GRPOConfig(beta=0.1)\ntune(a)\nb = tune(c=a)",
            ["line 4: tune(a)", "line 5: b = tune(c=a)"],
        ),
        ("a = tune(GRPOConfig(beta=0.1))", ["line 1: a = tune(GRPOConfig(beta=0.1))"]),
        ("a = GRPOConfig(beta=0.1)\nb = copy.replace(a, beta=1)", ["line 2: b = copy.replace(a, beta=1)"]),
        ("a = GRPOConfig(beta=0.1)\nb = a\nb.beta = 1", ["line 3: b.beta = 1"]),
        ("a = GRPOConfig(beta=0.1)\na.set_training(seed=3)", ["line 2: a.set_training(seed=3)"]),
        ("a = GRPOConfig(beta=0.1)\na.__dict__['beta'] = 1", ["line 2: a.__dict__['beta'] = 1"]),
        ("a = GRPOConfig(beta=0.1)\nvars(a)['beta'] = 1", ["line 2: vars(a)['beta'] = 1"]),
        ("def make():\n    return GRPOConfig(beta=0.1)\na = make()\na.beta = 1", ["line 4: a.beta = 1"]),
        ("def make():\n    a = GRPOConfig(beta=0.1)\n    return a\nb = make()\nb.beta = 1", ["line 5: b.beta = 1"]),
        (
            "a = GRPOConfig(beta=0.1)\nprint(a, vars(a), a.beta)\nt = GRPOTrainer(m, args=a)\nf(a.beta)\nt.train()\n"
            "out = t.args.output_dir\nd = a.to_dict()",
            [],
        ),
        ("a = parse()\nsetup(a)\na = GRPOConfig(beta=0.1)\ndef f(a):\n    g(a)\n    a.seed = 1", []),
        (
            "lora = LoraConfig(r=8)\nsetattr(lora, 'r', 4)\na = GRPOConfig(beta=0.1)\nmodel = get_peft_model(m, lora)\nf(a)",
            ["line 2: setattr(lora, 'r', 4)", "line 5: f(a)"],
        ),
        ("beta=0.1,\nseed=1", []),
        ("beta: 0.1", []),
    ],
)
def test_what_may_change_the_config_without_being_read_is_named(text, lines):
    assert parse_config(text)["beta"] == 0.1
    assert parse_unread(text) == lines


def test_the_command_says_what_it_has_not_read(tmp_path):
    source, target, out = tmp_path / "train.py", tmp_path / "mine.yaml", io.StringIO()
    source.write_text("import trl\nargs = trl.GRPOConfig(seed=3)\nadjust(args)\n")
    assert main([str(source), "--output", str(target)], Console(file=out, width=200)) == 0
    line = "not read, what it may set is missing here: line 3: adjust(args)"
    assert line in out.getvalue().splitlines() and f"# {line}" in target.read_text().splitlines()
