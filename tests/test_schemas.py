"""Tool definitions of any dialect become OpenAI tool schemas, and proper ones pass through untouched."""

import json

import pytest

from itool_jax.data.schemas import (
    flat_schema,
    json_schema,
    json_type,
    tool_schema,
    tool_schemas,
    tools_inside,
)

PROPER = {
    "type": "function",
    "function": {
        "strict": True,
        "name": "f",
        "parameters": {
            "properties": {
                "type": {"type": "string", "enum": ["a", "b"]},
                "properties": {"type": "object", "properties": {"x": {"type": ["integer", "null"]}}},
                "items": {"type": "array", "items": {"type": "number", "minimum": 0}},
                "any": {"anyOf": [{"type": "string"}, {"type": "null"}]},
            },
            "type": "object",
            "required": ["type"],
        },
        "description": "d",
    },
}


@pytest.mark.parametrize(
    ("name", "schema"),
    [
        ("str", {"type": "string"}),
        ("int, optional", {"type": "integer"}),
        ("Optional[float]", {"type": "number"}),
        ("typing.Dict[str, int]", {"type": "object"}),
        ("boolean", {"type": "boolean"}),
        ("List", {"type": "array"}),
        ("List[int]", {"type": "array", "items": {"type": "integer"}}),
        ("List[List[str]]", {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}),
        ("Tuple[float, float]", {"type": "array", "items": {"type": "number"}}),
        ("List[Union[int, float]]", {"type": "array", "items": {"type": ["integer", "number"]}}),
        ("Union[str, List[int]]", {"anyOf": [{"type": "string"}, json_type("List[int]")]}),
        ("['string', 'null']", {"type": ["string", "null"]}),
        ("Callable[[float], float]", {"type": "string"}),
        ("", {"type": "string"}),
    ],
)
def test_python_types_become_json_schema(name, schema):
    assert json_type(name) == schema


@pytest.mark.parametrize("name", ["string", "integer", "number", "boolean", "object", "array", "null"])
def test_json_types_stay(name):
    assert json_type(name) == {"type": name}


def test_a_proper_schema_passes_through_to_the_order_of_its_keys():
    assert json.dumps(tool_schema(PROPER)) == json.dumps(PROPER)


@pytest.mark.parametrize(
    "parameters", [{}, {"parameters": None}, {"parameters": {}}, {"parameters": {"type": "object"}}]
)
def test_parameters_and_a_description_that_a_tool_lacks_are_filled_in(parameters):
    expected = {"name": "ping", "description": "", "parameters": {"type": "object", "properties": {}}}
    for function in ({"name": "ping"} | parameters, {"name": "ping", "description": None} | parameters):
        tool = tool_schema({"type": "function", "function": function})
        assert tool == {"type": "function", "function": expected}
        assert tool_schema(tool) == tool
    assert tool_schema({"function": {"name": "ping"}})["type"] == "function"


def test_python_types_are_replaced_at_every_level():
    inner = {"type": "dict", "properties": {"a": {"type": "list", "items": {"type": "float"}}}}
    expected = {"type": "object", "properties": {"a": {"type": "array", "items": {"type": "number"}}}}
    assert json_schema({"type": "dict", "properties": {"x": inner}})["properties"]["x"] == expected


def test_flat_parameters_tell_what_is_required_and_type_their_defaults():
    schema = flat_schema(
        {
            "type": {"type": "str", "description": "d", "default": ""},
            "days": {"type": "int, optional", "default": "3"},
            "loud": {"type": "bool", "default": "True"},
            "unit": {"type": "str", "default": "3"},
            "odd": {"type": "int", "default": "many"},
        }
    )
    assert schema["required"] == ["type"]
    assert schema["properties"]["type"] == {"type": "string", "description": "d"}
    defaults = {name: item.get("default") for name, item in schema["properties"].items()}
    assert defaults == {"type": None, "days": 3, "loud": True, "unit": "3", "odd": "many"}
    assert flat_schema({"a": {"type": "str"}}, required=[])["required"] == []


def test_bare_functions_are_wrapped_with_parameters_flat_or_not():
    full = {"type": "dict", "properties": {"a": {"type": "str"}}}
    expected = {"type": "object", "properties": {"a": {"type": "string"}}}
    tool = tool_schema({"name": "f", "parameters": full, "required": ["a"]})
    assert tool["type"] == "function"
    assert tool["function"] == {"name": "f", "description": "", "parameters": expected | {"required": ["a"]}}
    assert tool_schema({"name": "f", "parameters": {"a": {"type": "str"}}}) == tool
    assert tool_schema({"name": "f", "arguments": full | {"required": ["a"]}}) == tool


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([{"description": "d"}], 'no "name"'),
        (["f"], 'no "name"'),
        ({"name": "f"}, "not a list"),
        ("[{", "not valid JSON"),
        ([{"name": "f", "parameters": []}], 'parameters of tool "f"'),
        ([{"name": "f", "parameters": {"a": "str"}}], 'parameter "a"'),
        ([{"name": "f", "description": 5}], '"description" of tool "f" is not a string'),
        ([{"name": "f", "parameters": {"properties": {}, "required": True}}], '"required" of tool "f" is not a list'),
        ([{"function": {"name": "f", "description": 5}}], '"description" of tool "f" is not a string'),
        ([{"function": {"name": "f", "parameters": {"required": True}}}], '"required" of tool "f" is not a list'),
        ([{"function": {"name": "f", "parameters": {"properties": []}}}], '"properties" of tool "f" is not an object'),
    ],
)
def test_wrong_tools_are_named(tools, reason):
    with pytest.raises(ValueError, match=reason):
        tool_schemas(tools)


@pytest.mark.parametrize("write", [json.dumps, repr])
def test_tools_are_found_inside_a_text(write):
    tools = [{"name": "f", "description": "it's [a] {b}", "ok": True}]
    text = f"Answer as [func(x=1)].\nTools: {write(tools)}"
    inside, start, end = tools_inside(text)
    assert inside == tools
    assert text[start:end] == write(tools)
    for nothing in ("no list [x] here, nor [{here}]", "[{[1]: 2}]"):
        assert tools_inside(nothing)[0] == []


def test_absent_properties_and_requirements_of_tables_are_left_out():
    string = {"type": "string", "enum": None}
    schema = {"type": "object", "properties": {"a": string, "b": None}, "required": None}
    assert json_schema(schema) == {"type": "object", "properties": {"a": {"type": "string"}}}
