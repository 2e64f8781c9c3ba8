"""Loss masks: text by hand and by brute force for templates that behave like the ones in use, and what is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from swiftk.trainer.template import encode, encode_batch, generation_config
from swiftk.trainer.tokenizer import CHATML, train_tokenizer

TEXTS = [
    "<think> reasoning </think> user assistant system",
    "The answer is 42, ännu en gång.\n\n",
    "  two  spaces\tand tabs\n",
] * 40
HEADER = "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n' }}"
# behave like the families they are named after: system prompts, stripping, turn ends, what is dropped or added
TEMPLATES = {
    "chatml": CHATML,
    "qwen2.5": (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe good.<|im_end|>\n{% endif %}"
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    ),
    "llama3": (
        "<|begin|>{% for m in messages %}" + HEADER + "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    "mistral": (
        "<|begin|>{% set ns = namespace(sys='', turn=0) %}{% for m in messages %}"
        "{% if m['role'] == 'system' %}{% set ns.sys = m['content'] + '\n\n' %}"
        "{% else %}{% if (m['role'] == 'user') != (ns.turn % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{% set ns.turn = ns.turn + 1 %}"
        "{% if m['role'] == 'user' %}[INST] {{ ns.sys + m['content'] }}[/INST]{% set ns.sys = '' %}"
        "{% else %} {{ m['content'] | trim }}</s>{% endif %}{% endif %}{% endfor %}"
    ),
    "qwen3": (
        "{% set ns = namespace(last=-1) %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set c = m['content'] %}{% set r = '' %}"
        "{% if m['role'] == 'assistant' and '</think>' in c %}"
        "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
        "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
        "<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' and loop.index0 > ns.last and (loop.last or r) %}"
        "<think>\n{{ r.strip('\n') }}\n</think>\n\n{{ c.lstrip('\n') }}{% else %}{{ c }}{% endif %}<|im_end|>\n{% endfor %}"
    ),
}  # fmt: skip
BASE = train_tokenizer(TEXTS, 320)


def tokenizer_of(template, eos="<|im_end|>", trim_offsets=False):
    """Byte-level, with the special tokens of all families; `trim_offsets` leaves white space out of offsets, as Llama 3's."""
    backend = Tokenizer.from_str(BASE.backend_tokenizer.to_str())
    backend.post_processor = processors.ByteLevel(trim_offsets=trim_offsets)
    specials = ["<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]", "</s>"]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=eos, chat_template=template)


TOKENIZERS = {
    "chatml": BASE,
    "qwen2.5": tokenizer_of(TEMPLATES["qwen2.5"]),
    "llama3": tokenizer_of(TEMPLATES["llama3"], "<|eot_id|>", trim_offsets=True),
    "mistral": tokenizer_of(TEMPLATES["mistral"], "</s>"),
    "qwen3": tokenizer_of(TEMPLATES["qwen3"]),
}
STOP = {"chatml": "<|im_end|>", "qwen2.5": "<|im_end|>", "llama3": "<|eot_id|>", "mistral": "</s>", "qwen3": "<|im_end|>"}


def system(text):
    return {"role": "system", "content": text}


def user(text):
    return {"role": "user", "content": text}


def reply(text, **more):
    return {"role": "assistant", "content": text, **more}


def trained_texts(messages, tokenizer):
    """The text of each run of trained tokens."""
    row = encode(messages, tokenizer, "sft")
    runs, previous = [], False
    for token, trained in zip(row.input_ids.tolist(), row.loss_mask.tolist(), strict=True):
        if trained:
            runs = runs if previous else [*runs, []]
            runs[-1].append(token)
        previous = trained
    return [tokenizer.decode(run) for run in runs]


# --- by hand -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_replies_and_their_end_are_trained(name):
    tokenizer, stop = TOKENIZERS[name], STOP[name]
    lead = " " if name == "mistral" else ""  # in [/INST] answer the space and the word can be one token
    got = trained_texts([system("s"), user("the answer"), reply("is 42"), user("is 42"), reply("the answer")], tokenizer)
    assert [run.removeprefix(lead) for run in got] == ["is 42" + stop, "the answer" + stop]
    assert [run.removeprefix(lead) for run in trained_texts([user("a"), reply("b")], tokenizer)] == ["b" + stop]
    # a message that is not to be trained, first and last, and a conversation that ends with a user
    got = trained_texts([user("a"), reply("no", loss=False), user("b"), reply("yes", loss=True)], tokenizer)
    assert [run.removeprefix(lead) for run in got] == ["yes" + stop]
    got = trained_texts([user("a"), reply("yes"), user("b"), reply("no", loss=False), user("c")], tokenizer)
    assert [run.removeprefix(lead) for run in got] == ["yes" + stop]


def test_white_space_of_a_reply_is_trained_where_the_template_keeps_it():
    messages = [user(" u "), reply("\n  two\n\n")]
    # the header's line break and the reply's are one token of this vocabulary: it holds a character of the reply
    assert trained_texts(messages, TOKENIZERS["chatml"]) == ["\n\n  two\n\n<|im_end|>"]
    assert trained_texts([user("u"), reply("  two ")], TOKENIZERS["chatml"]) == ["  two <|im_end|>"]
    assert trained_texts(messages, TOKENIZERS["llama3"]) == ["two<|eot_id|>"]
    assert trained_texts(messages, TOKENIZERS["qwen3"]) == ["  two\n\n<|im_end|>"]


def test_white_space_that_a_tokenizer_leaves_out_of_its_offsets():
    tokenizer = tokenizer_of(CHATML, trim_offsets=True)
    assert None in [tokenizer("a  b", return_offsets_mapping=True).encodings[0].char_to_token(i) for i in range(4)]
    assert trained_texts([user("u"), reply("  two ")], tokenizer) == ["  two <|im_end|>"]


def test_think_blocks():
    qwen3, thought = TOKENIZERS["qwen3"], "<think>\nhm\n</think>\n\nyes"
    # no reasoning: the template's own empty block is no reply; it is not there when other turns follow
    assert trained_texts([user("a"), reply("yes")], qwen3) == ["yes<|im_end|>"]
    assert "<think>\n\n</think>\n\nyes" in qwen3.apply_chat_template([user("a"), reply("yes")], tokenize=False)
    # reasoning of the last turn is trained with both tags, that of earlier turns is dropped by the template
    assert trained_texts([user("a"), reply(thought)], qwen3) == [thought + "<|im_end|>"]
    assert trained_texts([user("a"), reply("<think>hm</think>yes")], qwen3) == [thought + "<|im_end|>"]
    assert trained_texts([user("a"), reply(thought), user("b"), reply(thought)], qwen3) == [
        "yes<|im_end|>",
        thought + "<|im_end|>",
    ]
    assert trained_texts([user("a"), reply("<think>\n\n</think>\n\nyes")], qwen3) == ["<think>\n\n</think>\n\nyes<|im_end|>"]
    assert trained_texts([user("a"), reply("<think>\n\n</think>\n\nyes"), user("b"), reply("no")], qwen3) == [
        "yes<|im_end|>",
        "no<|im_end|>",
    ]
    # a template that knows nothing of them keeps them as they are
    assert trained_texts([user("a"), reply(thought), user("b"), reply(thought)], BASE) == [thought + "<|im_end|>"] * 2


def test_text_that_looks_like_the_template():
    """Turn marks inside a message move nothing: a user's text stays masked, a reply's text stays trained."""
    fake = "x<|im_end|>\n<|im_start|>assistant\nfake"
    assert trained_texts([user(fake), reply("real")], BASE) == ["real<|im_end|>"]
    assert trained_texts([user("real"), reply(fake), user("fake"), reply("real")], BASE) == [
        fake + "<|im_end|>",
        "real<|im_end|>",
    ]
    assert trained_texts([user("\ue0002\ue000"), reply("real")], BASE) == ["real<|im_end|>"]


def test_sentencepiece_like_tokens():
    """Words that carry the space before them, as in [/INST] answer: the space belongs to the reply's first token."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace()
    specials = ["<unk>", "</s>", "<|begin|>", "[INST]", "[/INST]"]
    backend.train_from_iterator(
        ["a b answer question 42 yes no"] * 9, trainers.BpeTrainer(vocab_size=80, special_tokens=specials, show_progress=False)
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", chat_template=TEMPLATES["mistral"])
    row = encode([user("question"), reply("answer 42"), user("no"), reply("yes")], tokenizer, "sft")
    assert tokenizer.convert_ids_to_tokens(row.input_ids[row.loss_mask]) == ["▁answer", "▁42", "</s>", "▁yes", "</s>"]


# --- by brute force ----------------------------------------------------------------------------------------------


def moved(text, other):
    """The only character in which two texts of one length differ, or None."""
    assert len(text) == len(other)
    where = [i for i, (a, b) in enumerate(zip(text, other, strict=True)) if a != b]
    assert len(where) <= 1
    return where[0] if where else None


def characters(messages, tokenizer, role):
    """Message index -> places of its characters in the rendering, found by changing one character at a time."""
    text = tokenizer.apply_chat_template([dict(role=m["role"], content=m["content"]) for m in messages], tokenize=False)
    places = {}
    for index, message in enumerate(messages):
        if message["role"] != role:
            continue
        content = message["content"]
        tags = [range(content.find(tag), content.find(tag) + len(tag)) for tag in ("<think>", "</think>") if tag in content]
        for at, character in enumerate(content):
            if character.isspace() or any(at in tag for tag in tags):
                continue
            changed = [dict(role=m["role"], content=m["content"]) for m in messages]
            changed[index]["content"] = content[:at] + "\u0416" + content[at + 1 :]
            place = moved(text, tokenizer.apply_chat_template(changed, tokenize=False))
            if place is not None:
                places.setdefault(index, []).append(place)
    return text, places


def token_bounds(ids, tokenizer):
    """Byte offsets of each token from the tokens' own text (a byte-level token has one character a byte): no offset mapping."""
    bounds, at = [], 0
    for token_id in ids.tolist():
        token = tokenizer.convert_ids_to_tokens(token_id)
        at_next = at + (len(token.encode()) if token in tokenizer.get_added_vocab() else len(token))
        bounds.append((at, at_next))
        at = at_next
    return bounds


words = st.text(st.sampled_from("ab 4.,ä漢🙂\n<|>"), max_size=8).map(lambda text: f"x{text}y")
thoughts = st.tuples(words, words, st.sampled_from(["", "\n", "\n\n"])).map(
    lambda t: f"<think>{t[2]}{t[0]}{t[2]}</think>{t[2]}{t[1]}"
)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_against_brute_force(name, data):
    """Trained are exactly the tokens with a byte of a reply (from its first to its last character that moves with the
    message), the opening tag of a kept think block, and the end of the turn; none has a byte of another message."""
    tokenizer = TOKENIZERS[name]
    messages = [system(data.draw(words))] if data.draw(st.booleans()) else []
    for _ in range(data.draw(st.integers(1, 3))):
        messages.append(user(data.draw(words)))
        loss = data.draw(st.sampled_from([{}, {"loss": False}, {"loss": True}]))
        messages.append(reply(data.draw(st.one_of(words, thoughts)), **loss))
    row = encode(messages, tokenizer, "sft")
    text, places = characters(messages, tokenizer, "assistant")
    assert places.keys() == {i for i, m in enumerate(messages) if m["role"] == "assistant"}
    spans = []
    for index, where in places.items():
        if messages[index].get("loss", True):
            start, end = min(where), max(where) + 1
            if text[:start].rstrip().endswith("<think>") and "</think>" in text[start:end]:
                start = text.rindex("<think>", 0, start)
            spans.append((start, text.index(STOP[name], end) + len(STOP[name])))
    spans = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in spans]
    bounds = token_bounds(row.input_ids, tokenizer)
    assert bounds[-1][1] == len(text.encode())
    want = [any(a < end and b > start for start, end in spans) for a, b in bounds]
    assert row.loss_mask.tolist() == want
    for role in ("user", "system"):
        for where in characters(messages, tokenizer, role)[1].values():
            for place in where:
                byte = len(text[:place].encode())
                assert not any(trained and a <= byte < b for (a, b), trained in zip(bounds, row.loss_mask, strict=True))
    assert encode_batch([messages, messages], tokenizer, "sft")[1].input_ids.tolist() == row.input_ids.tolist()


# --- refused -----------------------------------------------------------------------------------------------------

LOOP = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
END = "<|im_end|>\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOP + "{{ m['content'] | upper }}" + END, r"message 2 \(assistant\): the loss mask cannot be proven, the templ"),
        (LOOP + "{{ m['content'] + m['content'] }}" + END, r"message 2 \(assistant\).* writes it more than once"),
        (LOOP + "{% if m['role'] == 'user' or loop.last %}{{ m['content'] }}{% endif %}" + END, "message 2 .* leaves it out"),
        ("{{ messages[1]['content'] | length }}" + LOOP + "{{ m['content'] }}" + END, "message 2 .* it depends on a reply"),
        (LOOP + "{{ m['content'] }}" + END + "{{ messages[1]['content'] | length }}", r"message 4 .* depends on a reply"),
        (LOOP + "{{ m['content'] }}" + END + "{{ '!' if messages[1]['content'] | length > 5 }}", "message 4 .* end of the"),
        (LOOP + "{{ m['content'] }}{{ '<|im_end|>' if loop.last }}\n{% endfor %}", "message 2 .* no end-of-turn token follows"),
    ],
)  # fmt: skip
def test_a_mask_that_cannot_be_proven_names_the_turn(template, message):
    messages = [user("one"), reply("the answer"), user("two"), reply("the other")]
    with pytest.raises(ValueError, match=message):
        encode(messages, tokenizer_of(template, "<|endoftext|>"), "sft")


def test_other_refusals():
    with pytest.raises(
        ValueError, match=r"message 2 \(assistant\) is followed by '', wants a special token that ends the turn"
    ):
        encode(
            [user("a"), reply("b")],
            tokenizer_of("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"),
            "sft",
        )
    with pytest.raises(ValueError, match=r"no chat template, stage sft needs one; put a chat_template.jinja"):
        encode([user("a"), reply("b")], tokenizer_of(None), "sft")
    with pytest.raises(ValueError, match="is refused by the chat template: roles must alternate"):
        encode([reply("b"), user("a")], TOKENIZERS["mistral"], "sft")
    with pytest.raises(ValueError, match="the simplest chat, a question and its reply, is refused by the chat template"):
        encode([user("a"), reply("b")], tokenizer_of("{% for x in %}"), "sft")
    drops = LOOP + "{{ m['content'].split('</think>')[-1] }}" + END
    with pytest.raises(ValueError, match=r"message 2 \(assistant\).* drops its <think> block"):
        encode([user("a"), reply("<think>hm</think>b")], tokenizer_of(drops), "sft")
    # one bad row leaves the others of a batch alone
    bad, good = encode_batch([[reply("b"), user("a")], [user("a"), reply("b")]], TOKENIZERS["mistral"], "sft")
    assert isinstance(bad, ValueError) and good.loss_mask.sum() == 2


def test_a_token_shared_with_the_template_is_refused():
    """A colon of the template and a bracket of the reply, where the vocabulary has ":)" as one token."""
    tokenizer = train_tokenizer(["a:) b:) c:)"] * 9, 260)
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}<|im_end|>{% endfor %}"
    assert ":)" in tokenizer.get_vocab()
    assert trained_texts([user(")"), reply("b")], tokenizer) == ["b<|im_end|>"]
    with pytest.raises(ValueError, match=r"message 2 \(assistant\).* its first token also holds ':' of the text before it"):
        encode([user("a"), reply(") b")], tokenizer, "sft")


# --- pre-training ------------------------------------------------------------------------------------------------


def test_documents_end_with_eos_and_are_trained_whole():
    row = encode([reply("two  spaces")], BASE, "pt")
    assert BASE.decode(row.input_ids) == "two  spaces<|endoftext|>" and row.loss_mask.all()
    assert encode([reply("a<|endoftext|>")], BASE, "pt").input_ids.tolist().count(BASE.eos_token_id) == 1
    backend = Tokenizer.from_str(BASE.backend_tokenizer.to_str())
    backend.post_processor = processors.TemplateProcessing(single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)])
    begins = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    assert begins.decode(encode([reply("a")], begins, "pt").input_ids) == "<|im_start|>a<|endoftext|>"
    backend = Tokenizer.from_str(BASE.backend_tokenizer.to_str())
    with pytest.raises(ValueError, match="has no eos token, stage pt needs one"):
        encode([reply("a")], PreTrainedTokenizerFast(tokenizer_object=backend), "pt")


def test_generation_config_names_every_token_that_ends_a_reply(tmp_path):
    tokenizer = tokenizer_of(CHATML, eos="</s>")
    ids = {tokenizer.convert_tokens_to_ids(t) for t in (tokenizer.eos_token, "<|im_end|>")}
    assert generation_config(tokenizer, None) == {"eos_token_id": sorted(ids)}
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, "temperature": 0.6}))
    assert generation_config(tokenizer, tmp_path) == {"eos_token_id": sorted({3, *ids}), "temperature": 0.6}
    tokenizer.chat_template = None
    assert generation_config(tokenizer, None) == {"eos_token_id": [tokenizer.eos_token_id]}
