"""A byte-level BPE tokenizer trained on the standard library's docstrings, and chat templates of the common families."""

from __future__ import annotations

import ast
import functools
import sysconfig
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nBe helpful.<|im_end|>\n{% endif %}"
    + CHATML
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set sys = '<<SYS>>\n' ~ messages[0].content ~ '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set sys = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ (sys if loop.first else '') ~ m.content.strip() ~ ' [/INST]' }}"
    "{% else %}{{ ' ' ~ m.content.strip() ~ ' ' ~ eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header|>{{ m.role }}<|end_header|>\n\n{{ m.content | trim }}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header|>assistant<|end_header|>\n\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# A system prompt goes into the last user turn; tool calls replace the content and do not count for the alternation.
MISTRAL = (
    "{% set ns = namespace(system='', turns=0, last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{{ bos_token }}"
    "{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content ~ '\n\n' %}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' ~ m.content ~ '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS] ' ~ (m.tool_calls | map(attribute='function') | list | tojson) ~ eos_token }}"
    "{% else %}{% if (m.role == 'user') != (ns.turns % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% set ns.turns = ns.turns + 1 %}"
    "{% if m.role == 'user' %}{% if loop.index0 == ns.last and tools %}{{ '[AVAILABLE_TOOLS] ' ~ (tools | tojson) ~ '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' ~ (ns.system if loop.index0 == ns.last else '') ~ m.content ~ '[/INST]' }}"
    "{% else %}{{ ' ' ~ m.content ~ eos_token }}{% endif %}{% endif %}{% endfor %}"
)
CHATML_TOOLS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.content %}{{ '\n' ~ m.content }}{% endif %}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>\n' ~ (call.function | tojson) ~ '\n</tool_call>' }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant\n{% generation %}{{ m.content }}<|im_end|>\n{% endgeneration %}"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
)
# Reasoning of turns before the last user message is dropped; after it a think block is always written, empty or not.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set content = m.content %}{% set reasoning = '' %}"
    "{% if '</think>' in content %}{% set reasoning = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>assistant\n{% if loop.index0 > ns.last %}<think>\n{{ reasoning }}\n</think>\n\n{% endif %}{{ content }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

SPECIAL = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header|>",
    "<|end_header|>",
    "<|eot|>",
]


@functools.lru_cache
def train_tokenizer(
    vocab_size: int = 512, chat_template: str | None = CHATML
) -> PreTrainedTokenizerFast:
    """A tokenizer with `vocab_size` ids; `<|im_end|>` ends a sequence, `<|endoftext|>` pads."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(docstrings(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=chat_template,
    )


@functools.lru_cache
def train_sentencepiece_tokenizer(
    chat_template: str | None = LLAMA2,
) -> PreTrainedTokenizerFast:
    """A tokenizer that puts a space before every text, as those of Llama 2 and Mistral do."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Metaspace(prepend_scheme="first"),
        ]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
    )
    tokenizer.train_from_iterator(docstrings(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    )


@functools.lru_cache
def docstrings() -> tuple[str, ...]:
    """Real English text: docstrings of some modules that every Python carries."""
    library = Path(sysconfig.get_path("stdlib"))
    texts: list[str] = []
    for name in (
        "argparse",
        "ast",
        "collections/__init__",
        "dataclasses",
        "datetime",
        "decimal",
        "functools",
        "pathlib",
        "random",
        "statistics",
    ):
        path = library / f"{name}.py"
        if path.exists():
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
            texts += [
                text
                for node in nodes
                if isinstance(node, documented) and (text := ast.get_docstring(node))
            ]
    return tuple(texts)
