"""Calls: the streaming reader against itself and the whole, every fault by its kind, values typed by their schema."""

import json

from hypothesis import given, settings, strategies as st
import pytest

from glm5_jax.text import chat, grammar, mask, schema, stream, tools, values
from glm5_jax.text.grammar import Event, Fault, Kind, RawCall, Reply
from glm5_jax.text.stream import IdStream, TextStream
from glm5_jax.text.tokenizer import Tokenizer
from glm5_jax.text.tools import CallError, Misuse


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.packaged()


def test_events_written_out():
    events, held = TextStream.begin().feed("so</think>Look:<tool_ca")
    assert events == [Event(Kind.REASONING, "so"), Event(Kind.THOUGHT_END), Event(Kind.CONTENT, "Look:")]
    events, held = held.feed("ll>f<arg_key>k</arg_key><arg_value>1")
    assert events == [Event(Kind.CALL, "f", 0), Event(Kind.ARGUMENT, "k", 0), Event(Kind.VALUE, "1", 0)]
    events, held = held.feed("2</arg_value></tool_call><tool_call>g</tool_call>")
    assert events == [Event(Kind.VALUE, "2", 0), Event(Kind.CALL_END, "", 0), Event(Kind.CALL, "g", 1),
                      Event(Kind.CALL_END, "", 1)]
    assert held.close() == []


def test_a_marker_in_the_making_is_held_back_and_nothing_else():
    events, held = TextStream.begin(thinking=False).feed("a <")
    assert events == [Event(Kind.CONTENT, "a ")]
    events, held = held.feed("b<too")
    assert events == [Event(Kind.CONTENT, "<b")]
    assert held.close() == [Event(Kind.CONTENT, "<too")]


pieces = st.lists(st.one_of(st.sampled_from(stream.MARKERS + ("<think>", "<", "</", "<tool_", "a", "é中", " ", "\r\n",
                            "<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>")),
                            st.text(max_size=3)), max_size=12).map("".join)


@settings(deadline=None, derandomize=True, max_examples=400)
@given(pieces, st.booleans(), st.data())
def test_any_chunks_give_the_reply_of_the_whole(text, thinking, data):
    reader, events, begin = TextStream.begin(thinking=thinking), [], 0
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    for cut in cuts + [len(text)]:
        more, reader = reader.feed(text[begin:cut])
        events, begin = events + more, cut
    whole = stream.read_text(text, thinking=thinking)
    assert grammar.collect(events + reader.close()) == whole
    letters, one_by_one = TextStream.begin(thinking=thinking), []
    for letter in text:
        more, letters = letters.feed(letter)
        one_by_one += more
    assert grammar.collect(one_by_one + letters.close()) == whole


@settings(deadline=None, derandomize=True, max_examples=200)
@given(pieces, st.booleans(), st.data())
def test_ids_in_any_portions_give_the_same_reply(tokenizer, text, thinking, data):
    ids = tokenizer.encode(text, specials=True)
    reader, events, begin = IdStream.begin(tokenizer, thinking=thinking), [], 0
    for cut in sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6))) + [len(ids)]:
        more, reader = reader.feed(ids[begin:cut])
        events, begin = events + more, cut
    assert grammar.collect(events + reader.close()) == stream.read_ids(tokenizer, ids, thinking=thinking)
    # Every marker spelled here is a token: then ids and text agree.
    assert stream.read_ids(tokenizer, ids, thinking=thinking) == stream.read_text(text, thinking=thinking)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(pieces, pieces, st.lists(st.tuples(st.text(min_size=1, max_size=5), st.dictionaries(pieces, pieces, max_size=2)),
                                max_size=2))
def test_what_was_rendered_is_read_from_ids(tokenizer, reasoning, content, calls):
    listed = [{"type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    message = {"role": "assistant", "reasoning_content": reasoning.strip() or "\n", "content": content.strip()}
    ids, _ = mask.encode(tokenizer, [message | {"tool_calls": listed}, {"role": "tool", "content": ""}])
    completion = ids[4:-2]  # between [gMASK]<sop><|assistant|><think> and <tool_response></tool_response>
    reply = stream.read_ids(tokenizer, completion)
    assert reply == Reply(reasoning.strip(), content.strip(), tuple(
        RawCall(name, tuple(arguments.items()), index) for index, (name, arguments) in enumerate(calls)), (),
        "<|observation|>")


def test_ids_tell_typed_markers_from_real_ones(tokenizer):
    text = "</think><tool_call>f</tool_call><|user|>"
    typed = tokenizer.encode(text)
    assert stream.read_ids(tokenizer, [*typed, tokenizer.id_of("</think>"), *typed]) == Reply(text, text, (), ())


def test_the_stop_token_ends_a_reply(tokenizer):
    stop = tokenizer.id_of("<|user|>")
    assert stream.read_ids(tokenizer, [*tokenizer.encode("a"), stop], thinking=False) == Reply(
        None, "a", (), (), "<|user|>")
    with pytest.raises(ValueError, match="expected no id after the stop token, found 7"):
        stream.read_ids(tokenizer, [stop, 7])


def test_a_letter_cut_in_half_is_shown_before_a_marker(tokenizer):
    half = tokenizer.encode("中")[:1]
    assert len(tokenizer.encode("中")) > 1
    reply = stream.read_ids(tokenizer, half + [tokenizer.id_of("</think>")] + half)
    assert (reply.reasoning, reply.content) == ("\ufffd", "\ufffd")


G = "<tool_call>g</tool_call>"
FAULTS = [  # (completion behind a lone </think>, faults as (kind, text, call), calls that are left, content)
    ("<tool_call>f", [(Fault.UNCLOSED_CALL, "f", 0)], [], ""),
    ("<tool_call>f<arg_key>k", [(Fault.UNCLOSED_CALL, "k", 0)], [], ""),
    ("<tool_call>f<arg_key>k</arg_key><arg_value>v", [(Fault.UNCLOSED_CALL, "", 0)], [], ""),
    ("<tool_call></tool_call>" + G, [(Fault.MISSING_NAME, "</tool_call>", 0)], ["g"], ""),
    ("<tool_call><arg_key>k</arg_key>", [(Fault.MISSING_NAME, "<arg_key>", 0)], [], ""),
    ("<tool_call>f<arg_key>k</arg_key></tool_call>" + G, [(Fault.MISSING_VALUE, "</tool_call>", 0)], ["g"], ""),
    ("<tool_call>f<arg_key>k</arg_key> v<arg_value>", [(Fault.MISSING_VALUE, " ", 0)], [], ""),
    ("<tool_call>f" + 2 * "<arg_key>k</arg_key><arg_value>v</arg_value>" + "</tool_call>",
     [(Fault.DUPLICATE_ARGUMENT, "</arg_key>", 0)], [], ""),
    ("<tool_call>f<arg_key>k</arg_key><arg_value>v</arg_value>\n</tool_call>", [(Fault.UNEXPECTED, "\n", 0)], [], ""),
    ("<tool_call>f" + G, [(Fault.UNEXPECTED, "<tool_call>", 0)], ["g"], ""),
    ("<tool_call>f</arg_value>" + G, [(Fault.UNEXPECTED, "</arg_value>", 0)], ["g"], ""),
    ("a" + G + "bc" + G, [(Fault.TEXT_AFTER_CALL, "b", 0)], ["g", "g"], "abc"),
    (G + "<tool_call>f", [(Fault.UNCLOSED_CALL, "f", 1)], ["g"], ""),
    ("</tool_call><arg_key>", [], [], "</tool_call><arg_key>"),
]


@pytest.mark.parametrize("text, faults, names, content", FAULTS)
def test_faults_have_their_kind_and_place(text, faults, names, content):
    reply = stream.read_text(text, thinking=False)
    assert [(event.fault, event.text, event.call) for event in reply.faults] == faults
    assert [call.name for call in reply.calls] == names
    assert reply.content == content
    message, errors = tools.understand(reply)
    assert [(error.kind, error.call) for error in errors] == [(kind, call) for kind, _, call in faults]
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == names


def test_every_fault_is_tested():
    assert {fault for _, faults, _, _ in FAULTS for fault, _, _ in faults} == set(Fault) - {Fault.UNCLOSED_THOUGHT}


def test_an_unclosed_thought_is_a_fault():
    reply = stream.read_text("a<tool_call>f</tool_call>")
    assert reply.reasoning == "a<tool_call>f</tool_call>" and not reply.calls
    assert [event.fault for event in reply.faults] == [Fault.UNCLOSED_THOUGHT]


def test_an_empty_thought_is_not_no_thought():
    assert stream.read_text("</think>a").reasoning == ""
    assert stream.read_text("a", thinking=False).reasoning is None
    for thinking, text in ((True, "<think></think>a"), (False, "</think>a")):
        message, _ = tools.understand(stream.read_text("</think>a" if thinking else "a", thinking=thinking))
        assert chat.render([message]) == "[gMASK]<sop><|assistant|>" + text


TOOLS = [
    tools.define("find", "Finds.", {
        "text": {"type": "string"}, "limit": {"type": "integer", "minimum": 1}, "exact": {"type": "boolean"},
        "scale": {"type": "number"}, "tags": {"type": "array", "items": {"type": "string"}},
        "where": {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": False},
        "id": {"type": ["string", "integer"]}, "mode": {"enum": ["1", "on"]}, "any": {}, "date": {"pattern": "x"},
        "maybe": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
    }, required=["text"]),
    {"name": "free", "parameters": {"type": "object", "additionalProperties": {"type": "integer"}}},
    {"type": "function", "function": {"name": "bare"}},
]


def read(name, **arguments):
    raw = "".join(f"<arg_key>{key}</arg_key><arg_value>{value}</arg_value>" for key, value in arguments.items())
    reply = stream.read_text(f"<tool_call>{name}{raw}</tool_call>", thinking=False)
    message, errors = tools.understand(reply, TOOLS)
    assert message["tool_calls"][0]["function"]["name"] == name
    return message["tool_calls"][0]["function"]["arguments"], [(error.kind, error.detail) for error in errors]


@pytest.mark.parametrize("key, raw, value", [
    ("text", "7", "7"), ("text", "true", "true"), ("text", '"x"', '"x"'), ("text", "[1,2]", "[1,2]"),
    ("limit", "7", 7), ("limit", "1e2", 100.0), ("exact", "true", True), ("scale", "1e5", 1e5), ("scale", "2", 2),
    ("tags", '["a","b"]', ["a", "b"]), ("where", '{"a":1}', {"a": 1}), ("id", "7", 7), ("id", "07", "07"),
    ("mode", "1", "1"), ("mode", "on", "on"), ("any", "7", 7), ("any", "1e5", "1e5"), ("maybe", "null", None),
])
def test_the_schema_types_a_value(key, raw, value):
    arguments, errors = read("find", **{"text": "t"} | {key: raw})
    assert arguments[key] == value and type(arguments[key]) is type(value)
    assert errors == []


@pytest.mark.parametrize("name, given_, kind, detail", [
    ("nobody", {"a": "1"}, Misuse.UNKNOWN_TOOL, r"expected one of ['find', 'free', 'bare'], found 'nobody'"),
    ("find", {}, Misuse.MISSING_ARGUMENT, "expected a value of 'text', found none"),
    ("find", {"text": "t", "limits": "1"}, Misuse.UNKNOWN_ARGUMENT, "found 'limits'"),
    ("bare", {"x": "1"}, Misuse.UNKNOWN_ARGUMENT, "expected one of [], found 'x'"),
    ("find", {"text": "t", "limit": "many"}, Misuse.BAD_JSON, "limit: expected integer, found 'many'"),
    ("find", {"text": "t", "where": "{'a': 1}"}, Misuse.BAD_JSON, "where: expected object"),
    ("find", {"text": "t", "exact": "True"}, Misuse.BAD_JSON, "exact: expected boolean, found 'True'"),
    ("find", {"text": "t", "limit": "NaN"}, Misuse.BAD_JSON, "limit: expected integer"),
    ("find", {"text": "t", "scale": "1e999"}, Misuse.BAD_JSON, "scale: expected number, found '1e999'"),
    ("find", {"text": "t", "scale": "-Infinity"}, Misuse.BAD_JSON, "scale: expected number"),
    ("find", {"text": "t", "tags": '["\\ud800"]'}, Misuse.BAD_JSON, "tags: expected array"),
    ("find", {"text": "t", "where": '{"\\udfff": 1}'}, Misuse.BAD_JSON, "where: expected object"),
    ("find", {"text": "t", "tags": "[" * 101 + "]" * 101}, Misuse.BAD_JSON, "tags: expected array"),
    ("find", {"text": "t", "limit": "7.5"}, Misuse.BAD_VALUE, "limit: expected integer, found 7.5"),
    ("find", {"text": "t", "limit": "0"}, Misuse.BAD_VALUE, "limit: expected minimum 1, found 0"),
    ("find", {"text": "t", "limit": "true"}, Misuse.BAD_VALUE, "limit: expected integer, found True"),
    ("find", {"text": "t", "tags": "[1]"}, Misuse.BAD_VALUE, "tags[0]: expected string, found 1"),
    ("find", {"text": "t", "where": '{"a": "x"}'}, Misuse.BAD_VALUE, "where.a: expected integer, found 'x'"),
    ("find", {"text": "t", "where": '{"b": 1}'}, Misuse.BAD_VALUE, "where.b: expected one of ['a']"),
    ("find", {"text": "t", "mode": "off"}, Misuse.BAD_VALUE, "mode: expected one of ['1', 'on'], found 'off'"),
    ("find", {"text": "t", "maybe": "x"}, Misuse.BAD_VALUE, "maybe: expected one of 2 alternatives"),
    ("find", {"text": "t", "date": "x"}, Misuse.UNCHECKED, "date: nothing was checked, pattern"),
    ("free", {"x": "y"}, Misuse.BAD_JSON, "x: expected integer"),
])
def test_misuse_has_its_kind(name, given_, kind, detail):
    _, errors = read(name, **given_)
    assert [found for found, _ in errors] == [kind] and detail in errors[0][1]


def test_values_are_taken_up_to_their_bounds():
    deepest = "[" * values.NESTING + "]" * values.NESTING
    assert json.dumps(values.load(deepest)) == deepest
    assert values.load('["\\ud83d\\ude00", 1e308]') == ["😀", 1e308]
    for text in ("[" + deepest + "]", '{"a":' + deepest + "}", "[" * 10**5, "1e999", "[NaN]", '"\ud800"'):
        with pytest.raises(ValueError, match="expected .* found"):
            values.load(text)


def test_errors_name_the_call():
    text = "<tool_call></tool_call><tool_call>bare</tool_call><tool_call>x</tool_call>"
    reply = stream.read_text(text, thinking=False)
    _, errors = tools.understand(reply, TOOLS)
    assert [(error.kind, error.call) for error in errors] == [(Fault.MISSING_NAME, 0), (Misuse.UNKNOWN_TOOL, 2)]
    assert isinstance(errors[0], CallError)
    assert read("free", x="7") == ({"x": 7}, [])


@pytest.mark.parametrize("definitions, match", [
    (["f"], r"tools\[0\].name: expected a name, found None"),
    ([{"name": " "}], r"tools\[0\].name"),
    ([{"name": "f"}, {"function": {"name": "f"}}], r"tools\[1\].name: expected a name of its own"),
    ([{"name": "f", "parameters": {"type": "array"}}], r"tools\[0\].parameters: expected a JSON schema of type object"),
    ([{"name": "f", "parameters": []}], r"tools\[0\].parameters: expected a JSON schema of type object, found \[\]"),
    ([{"name": "f", "parameters": {"properties": {1: {}}}}], r"properties: expected an object of schemas by name"),
    ([{"name": "f", "parameters": {"required": [[]]}}], r"parameters.required: expected a list of names, found \[\["),
    ([{"name": "f", "parameters": {"properties": [1]}}], r"tools\[0\].parameters.properties: expected an object"),
    ([{"name": "f", "parameters": {"required": ["a"]}}], r"tools\[0\].parameters.required: expected names of \[\]"),
    ([{"name": "f", "parameters": {"properties": {"a": {"items": {"type": "str"}}}}}],
     r"tools\[0\].parameters.properties.a.items.type: expected some of .*'string'.*found 'str'"),
    ([{"name": "f", "parameters": {"properties": {"a": {"anyOf": [3]}}}}],
     r"properties.a.anyOf.0: expected an object or a boolean, found 3"),
    ([{"name": "f", "parameters": {"properties": {"a": {"maxLength": "3"}}}}], "maxLength: expected a number, found"),
    ([{"name": "f", "parameters": {"properties": {"a": {"enum": "ab"}}}}], r"a.enum: expected a list, found 'ab'"),
])
def test_malformed_definitions_are_named(definitions, match):
    with pytest.raises(ValueError, match=match):
        tools.check(definitions)


def test_a_definition_is_the_usual_dict():
    assert tools.define("f", "Does.", {"a": {"type": "string"}}, ["a"]) == {
        "type": "function", "function": {"name": "f", "description": "Does.", "parameters": {
            "type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}}
    with pytest.raises(ValueError, match="required"):
        tools.define("f", "", {}, ["a"])


@pytest.mark.parametrize("value, wanted, keywords", [
    (1, {"type": "integer"}, []), (1.0, {"type": "integer"}, []), (True, {"type": "integer"}, ["type"]),
    (True, {"type": "number"}, ["type"]), (None, {"type": ["string", "null"]}, []), ([], {"type": "object"}, ["type"]),
    (1, {"enum": [True, "1"]}, ["enum"]), (1.0, {"enum": [1]}, []), ([1, {"a": 2}], {"const": [1, {"a": 2.0}]}, []),
    ([True], {"const": [1]}, ["const"]), ("é", {"minLength": 2}, ["minLength"]), ("ab", {"maxLength": 2}, []),
    (3, {"minLength": 9, "maxItems": 0}, []), (3, {"minimum": 3, "maximum": 3}, []),
    (3, {"exclusiveMinimum": 3, "exclusiveMaximum": 3}, ["exclusiveMinimum", "exclusiveMaximum"]),
    ([1, 2], {"minItems": 3, "maxItems": 1}, ["minItems", "maxItems"]), (1, False, ["false"]), (1, True, []),
    ({"b": 1}, {"properties": {"a": {}}, "required": ["a"], "additionalProperties": False},
     ["required", "additionalProperties"]),
    ({"b": "x"}, {"additionalProperties": {"type": "integer"}}, ["type"]),
    (1, {"anyOf": [{"type": "string"}, {"$ref": "#/a"}]}, ["$ref"]), (1, {"anyOf": [{"$ref": "#/a"}, {}]}, []),
    (1, {"oneOf": [{}]}, ["oneOf"]), (1, {"title": "t", "description": "d", "default": 3, "format": "date"}, []),
])
def test_schema_keywords(value, wanted, keywords):
    schema.check(wanted)
    found = schema.mismatches(value, wanted)
    assert [mismatch.keyword for mismatch in found] == keywords
    assert all(mismatch.unsupported == (mismatch.keyword in ("$ref", "oneOf")) for mismatch in found)
