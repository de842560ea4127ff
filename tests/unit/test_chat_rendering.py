"""No text of a chat is lost in silence, masks by `loss_mask`, and dates of templates."""

from __future__ import annotations

import random

import jinja2
import pytest

from nemo_kd.config import ConfigError, DataError
from nemo_kd.config.data import DataConfig, DatasetConfig
from nemo_kd.data.chat_template import ChatTemplate, fixed_date
from nemo_kd.data.dataset import TokenizedDataset
from nemo_kd.data.tokenizer import load_tokenizer
from tests import tiny_tokenizer
from tests.chat_rendering import assistant, marked, render, trained_stretches, user
from tests.tiny_tokenizer import train_tokenizer

# DeepSeek-R1-Distill: only what follows </think> is kept, of every turn.
CUTS_REASONING = (
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|end_header|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|end_header|>{% endif %}"
)
# Roles that it does not name are dropped, as Qwen2.5 and Qwen3 do.
NAMED_ROLES = (
    "{% for m in messages %}{% if m.role in ['system', 'user', 'assistant'] %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
NAMES_OF_CALLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}<|im_end|>\n{% endfor %}"
)
# GLM-4: nothing ends a turn but the next one's header.
GLM = (
    "{% for m in messages %}<|{{ 'im_start' if m.role == 'user' else 'start_header' }}|>\n"
    "{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|start_header|>\n{% endif %}"
)
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "add", "arguments": {"a": 1, "b": "x"}},
}
THINKS = [
    user("a"),
    assistant("<think>\nold\n</think>\n\nfirst"),
    user("b"),
    assistant("<think>\nnew\n</think>\n\nlast"),
]


def refused(messages, template: str, **settings) -> str:
    tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template, template))
    with pytest.raises(DataError) as caught:
        render(messages, tokenizer, **settings)
    return str(caught.value)


@pytest.mark.parametrize(
    ("template", "messages", "lost"),
    [
        (CUTS_REASONING, THINKS[2:], r"message 1 (assistant): the chat template leaves out or changes the reasoning 'new'"),
        ("CHATML", [user("a"), {**assistant("b"), "reasoning_content": "why"}], "the reasoning 'why'"),
        (NAMED_ROLES, [user("a"), assistant("b"), {"role": "tool", "content": "rain"}, assistant("c")], "message 2 (tool): "),
        ("CHATML", [user("a"), {**assistant("I add."), "tool_calls": [CALL]}], "the tool call 'add'"),
        # The name of the call stands in the text, and in the call; its arguments are gone.
        (NAMES_OF_CALLS, [user("add"), {**assistant("add a b x"), "tool_calls": [CALL]}], "the tool call 'a'"),
        ("{% for m in messages %}{{ m.content[:9] if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}", [user("a"), assistant("a long answer")], "the content 'a long answer'"),
        ("{% for m in messages %}{{ m.content | upper if m.role == 'assistant' else m.content }}<|im_end|>{% endfor %}", [user("A"), assistant("b")], "message 1"),
        # Another message holds the same text.
        ("{% for m in messages[1:] %}{{ m.content }}<|im_end|>{% endfor %}", [user("same"), assistant("same")], "message 0 (user)"),
    ],
)  # fmt: skip
def test_text_that_the_template_loses_is_refused_or_counted(template, messages, lost):
    assert lost in refused(messages, template)
    assert lost in refused(messages, template, altered="refuse")
    if "upper" not in template and ":9" not in template:
        tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template, template))
        assert render(messages, tokenizer, altered="count").left_out.total() > 0


def test_a_part_of_a_user_message_that_is_lost_is_counted():
    template = "{% for m in messages %}<|im_start|>{{ m.content.split('#')[0] }}<|im_end|>{% endfor %}"
    tokenizer = train_tokenizer(512, template)
    messages = [{"role": "system", "content": "ok"}, user("a b#"), assistant("c")]
    assert "message 1 (user)" in refused(messages, template)
    _, _, left_out = render(messages, tokenizer, altered="count")
    assert left_out == {"content of user messages, changed by the chat template": 1}


def test_a_template_that_fails_on_bare_functions_names_the_form_of_tools():
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}" + GLM
    tools = [{"name": "add", "parameters": {}}]
    error = refused([user("a"), assistant("b")], template, tools=tools)
    assert "no attribute 'function'" in error
    assert '{"type": "function", "function": {...}}' in error


def test_tool_definitions_that_are_left_out_are_counted():
    tokenizer = train_tokenizer(512, tiny_tokenizer.CHATML)
    messages = [user("a"), assistant("b")]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rendered = render(messages, tokenizer, tools)
    assert rendered.left_out == {"tool definitions, left out by the chat template": 1}
    with pytest.raises(DataError, match="leaves out the tool definitions"):
        render(messages, tokenizer, tools, altered="refuse")


def test_a_marked_template_decides_even_where_turns_cannot_be_located():
    twice = (
        "{% for m in messages %}{% generation %}{{ m.content }}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% endfor %}"
    )
    tokenizer = train_tokenizer(512, twice)
    messages = [user("a"), assistant("b")]
    assert marked(messages, tokenizer) == "«aa<|im_end|>bb<|im_end|>»"


def test_reasoning_that_a_marked_template_cuts_is_kept():
    cuts = tiny_tokenizer.CHATML_MARKED.replace(
        "{% generation %}{{ m.content }}",
        "{% generation %}{{ m.content.split('</think>')[-1] }}",
    )
    text = marked(THINKS[2:], train_tokenizer(512, cuts), reasoning="keep")
    assert text.endswith("assistant\n«<think>\nnew\n</think>\n\nlast<|im_end|>»\n")


def test_white_space_that_a_template_strips_is_not_lost():
    tokenizer = train_tokenizer(512, tiny_tokenizer.LLAMA3)
    assert (
        marked([user("\n x "), assistant("\n\nfoo \n")], tokenizer)
        == "<|endoftext|><|start_header|>user<|end_header|>\n\nx<|eot|>"
        "<|start_header|>assistant<|end_header|>\n\n«foo<|eot|>»"
    )


@pytest.mark.parametrize("form", [lambda r: {"content": f"<think>\n{r}\n</think>\n\n51"}, lambda r: {"content": "51", "reasoning_content": r}])  # fmt: skip
def test_reasoning_is_kept_or_dropped_on_purpose(form):
    tokenizer = train_tokenizer(512, CUTS_REASONING)
    messages = [user("17 * 3?"), {"role": "assistant", **form("as 10*3 + 7*3")}]
    kept = marked(messages, tokenizer, reasoning="keep")
    assert kept.endswith("«<think>\nas 10*3 + 7*3\n</think>\n\n51<|im_end|>»")
    dropped = render(messages, tokenizer, reasoning="drop")
    assert dropped.left_out == {"reasoning dropped": 1}
    plain = render([user("17 * 3?"), assistant("51")], tokenizer)
    assert (dropped.ids, dropped.trained) == (plain.ids, plain.trained)


@pytest.mark.parametrize(
    ("template", "settings", "expected"),
    [
        ("QWEN3", {"altered": "count"}, ["first<|im_end|>", "<think>\nnew\n</think>\n\nlast<|im_end|>"]),
        ("QWEN3", {"loss_mask": "last_turn"}, ["<think>\nnew\n</think>\n\nlast<|im_end|>"]),
        ("QWEN3", {"loss_mask": "last_turn", "reasoning_loss": "exclude"}, ["last<|im_end|>"]),
        ("QWEN3", {"loss_mask": "last_turn", "reasoning_loss": "exclude_empty"}, ["<think>\nnew\n</think>\n\nlast<|im_end|>"]),
        # slime's qwen3: every turn with its think block, and the line break.
        ("QWEN3", {"loss_mask": "per_turn"}, ["<think>\nold\n</think>\n\nfirst<|im_end|>\n", "<think>\nnew\n</think>\n\nlast<|im_end|>\n"]),
        ("QWEN3", {"reasoning": "keep"}, ["<think>\nold\n</think>\n\nfirst<|im_end|>", "<think>\nnew\n</think>\n\nlast<|im_end|>"]),
        # slime's qwen.
        ("CHATML", {"loss_mask": "qwen"}, ["<think>\nold\n</think>\n\nfirst<|im_end|>\n", "<think>\nnew\n</think>\n\nlast<|im_end|>\n"]),
        ("CHATML", {"loss_mask": "last_turn"}, ["<think>\nnew\n</think>\n\nlast<|im_end|>"]),
    ],
)  # fmt: skip
def test_masks(template, settings, expected):
    tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template))
    ids, trained, _ = render(THINKS, tokenizer, **settings)
    assert trained_stretches(ids, trained, tokenizer) == expected


def test_per_turn_is_the_concatenation_of_turns_rendered_as_the_last_one():
    tokenizer = train_tokenizer(512, tiny_tokenizer.QWEN3)
    messages = [user("a"), assistant("first"), user("b"), assistant("last")]
    ids, trained, _ = render(messages, tokenizer, loss_mask="per_turn")
    turns = [
        tokenizer.apply_chat_template(messages[n : n + 2], tokenize=False)
        for n in (0, 2)
    ]
    assert tokenizer.decode(ids) == "".join(turns)
    assert trained_stretches(ids, trained, tokenizer) == [
        "<think>\n\n</think>\n\nfirst<|im_end|>\n",
        "<think>\n\n</think>\n\nlast<|im_end|>\n",
    ]
    ids, trained, _ = render(
        messages, tokenizer, loss_mask="per_turn", reasoning_loss="exclude_empty"
    )
    assert trained_stretches(ids, trained, tokenizer) == [
        "first<|im_end|>\n",
        "last<|im_end|>\n",
    ]


@pytest.mark.parametrize(
    ("template", "loss_mask", "message"),
    [
        ("QWEN3", "qwen", "message 1 (assistant): data.data.loss_mask=qwen does not fit the chat template: alone it"),
        ("LLAMA2", "qwen", "does not fit the chat template: alone, the chat template cannot render"),
        ("CHATML", "nemo_chat", "data.data.loss_mask=nemo_chat is the mask of `conversations`"),
    ],
)  # fmt: skip
def test_masks_that_do_not_fit_are_refused(template, loss_mask, message):
    assert message in refused([user("a"), assistant("b")], template, loss_mask=loss_mask)  # fmt: skip


def test_masks_of_chat_templates_are_refused_for_other_formats(tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_text('{"input": "a", "output": "b"}\n')
    config = DatasetConfig(file_path=str(path), loss_mask="last_turn")
    tokenizer = train_tokenizer(512)
    dataset = TokenizedDataset(DataConfig(data=config), tokenizer, 512, 512)
    with pytest.raises(
        DataError, match=r"d\.jsonl:1: data\.data\.loss_mask=last_turn"
    ):
        dataset[0]


@pytest.mark.parametrize("weight", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("template", ["CHATML", "CHATML_MARKED"])
def test_turns_of_weight_0_are_not_trained(template, weight):
    tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template))
    messages = [user("Hi"), {**assistant("BAD"), **weight}, user("y"), assistant("ok")]
    ids, trained, _ = render(messages, tokenizer)
    stretches = trained_stretches(ids, trained, tokenizer)
    assert [text.strip() for text in stretches if text.strip()] == ["ok<|im_end|>"]


def test_a_template_without_end_of_turns_trains_a_stop_token_on_the_last_turn_too():
    tokenizer = train_tokenizer(512, GLM)
    messages = [user("a"), assistant("first"), user("b"), assistant("last")]
    ids, trained, _ = render(messages, tokenizer)
    plain = tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
    assert ids == [*plain, tokenizer.convert_tokens_to_ids("<|im_start|>")]
    assert trained_stretches(ids, trained, tokenizer) == [
        "first<|im_start|>",
        "last<|im_start|>",
    ]
    assert render(messages[:3], tokenizer).ids[-1] != ids[-1]


class CountedTemplate(ChatTemplate):
    messages_rendered = 0

    def render(self, messages, **options):
        CountedTemplate.messages_rendered += len(messages)
        return super().render(messages, **options)


@pytest.mark.parametrize("template", ["CHATML", "QWEN3", "CHATML_TOOLS", "MISTRAL"])
def test_rendering_is_linear_in_the_number_of_turns(template, monkeypatch):
    monkeypatch.setattr("nemo_kd.data.template.ChatTemplate", CountedTemplate)
    tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template))
    rendered = {}
    for num_turns in (20, 200):
        messages = []
        for n in range(num_turns):
            messages += [user(f"Question {n}"), assistant(f"Answer {n}")]
            if template in ("CHATML_TOOLS", "MISTRAL"):
                function = {"name": "add", "arguments": {"a": f"{n}", "b": "x"}}
                call = {"type": "function", "id": "call00001", "function": function}
                messages[-1:] = [
                    {"role": "assistant", "content": None, "tool_calls": [call]},
                    {"role": "tool", "content": f"{n}"},
                    messages[-1],
                ]
        CountedTemplate.messages_rendered = 0
        render(messages, tokenizer)
        rendered[num_turns] = CountedTemplate.messages_rendered / len(messages)
    assert rendered[200] <= rendered[20] <= 12


PIECES = ["Hi", "there ", "\n", " ", "assistant", "user", "<|im_start|>", "<|im_end|>", "[/INST]", "naïve 你好 🙂", "ok", "Qzx0kvJ", '"q\\"', "it's", '{"a": 1}', "<tool_call>"]  # fmt: skip


@pytest.mark.parametrize("template", ["CHATML", "LLAMA3", "ZEPHYR", "CHATML_TOOLS"])
def test_random_conversations_train_what_the_assistant_wrote(template):
    """Their trained text is known: these templates write it as it is, or stripped."""
    tokenizer = train_tokenizer(512, getattr(tiny_tokenizer, template))
    end = "<|eot|>" if template == "LLAMA3" else "<|im_end|>"
    rng = random.Random(template)
    for _ in range(60):
        messages = []
        for _ in range(rng.randint(1, 4)):
            texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 6))) for _ in "ab"]
            messages += [user(texts[0] + "?"), assistant(texts[1] + ".")]
        ids, trained, left_out = render(messages, tokenizer)
        written = [message["content"] for message in messages[1::2]]
        if template == "LLAMA3":
            written = [text.strip() for text in written]
        stretches = trained_stretches(ids, trained, tokenizer)
        # A token may hold the first character of a turn and the last of its header.
        assert [text.lstrip("\n") for text in stretches] == [
            f"{text}{end}".lstrip("\n") for text in written
        ]
        assert not left_out


PRINTS_DATE = "<|im_start|>system\nToday: {{ strftime_now('%-d %b %Y, %j') }}<|im_end|>\n"  # fmt: skip


def test_a_template_prints_the_fixed_date():
    plain = train_tokenizer(512, tiny_tokenizer.CHATML)
    tokenizer = train_tokenizer(512, PRINTS_DATE + tiny_tokenizer.CHATML)
    messages = [user("a"), assistant("b")]
    text = marked(messages, tokenizer, date="2026-05-01")
    whole = marked(messages, plain)
    assert text == f"<|im_start|>system\nToday: 1 May 2026, 121<|im_end|>\n{whole}"
    settings = DatasetConfig(file_path="x")
    assert fixed_date(settings, plain) is None
    assert fixed_date(settings, tokenizer, "2026-05-01") == "2026-05-01"
    assert fixed_date(settings, tokenizer)
    with pytest.raises(ConfigError, match=r"data\.data\.date: 'May 1' must be a date"):
        DatasetConfig(file_path="x", date="May 1")


@pytest.mark.parametrize("start", ["  {% if 1 %}x{% endif %}", "\n\nx", "{%- if 1 %} x{% endif %}", "{# c #}\nx"])  # fmt: skip
def test_a_fixed_date_changes_nothing_else(start):
    source = start + "{{ strftime_now('%Y') }}" + tiny_tokenizer.CHATML
    tokenizer = train_tokenizer(512, source)
    messages = [user("a"), assistant("b")]
    fixed = ChatTemplate(tokenizer, day="2026-05-01").render(messages)
    # Jinja's own environment with transformers' options, and a function.
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(source)
    expected = template.render(messages=messages, strftime_now=lambda _: "2026")
    assert fixed == expected


def test_a_file_replaces_the_chat_template(tmp_path):
    train_tokenizer(300).save_pretrained(tmp_path / "t")
    (tmp_path / "x.jinja").write_text(tiny_tokenizer.ZEPHYR)
    path = str(tmp_path / "x.jinja")
    tokenizer = load_tokenizer(tmp_path / "t", path)
    assert marked([user("a"), assistant("b")], tokenizer).startswith("<|user|>")
    with pytest.raises(DataError, match=r"chat_template: .*none is not a readable"):
        load_tokenizer(tmp_path / "t", f"{tmp_path}/none")
