import time

import pytest

from sftcli.errors import DataError
from sftcli.modeling.tokenizer import sandbox
from sftcli.modeling.tokenizer.template import ChatTemplate, TemplateRefusedError

MESSAGES = [{"role": "user", "content": "Hi"}]


def render(source: str, **variables: object) -> str:
    return ChatTemplate(source, name="test").render(
        MESSAGES, tools=None, add_generation_prompt=False, variables=variables
    )


def refusal(source: str) -> str:
    with pytest.raises(TemplateRefusedError) as caught:
        render(source)
    return caught.value.message


def test_blocks_leave_no_white_space_as_in_transformers():
    assert (
        render("{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n{% endfor %}")
        == "Hi\n"
    )


def test_sums_are_taken_from_left_to_right_whatever_they_are_of():
    assert render("{{ 1 + 2 + 3 }}{{ [1] + [2] }}{{ 'a' + 'b' * 2 + ('c' + 'd') }}") == "6[1, 2]abbcd"
    assert refusal("{{ 1 + 2 + 'a' }}") == refusal("{{ 3 + 'a' }}")


def test_loops_can_be_left():
    assert render("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"


def test_a_loop_knows_its_length_and_neighbors():
    source = "{% for i in [1, 2] %}{{ loop.length }}{{ loop.last }}{{ loop.previtem }}{{ loop.nextitem }}|{% endfor %}"
    assert render(source) == "2False2|2True1|"


def test_json_is_not_escaped_for_web_pages():
    assert render("{{ value | tojson }}", value={"a": "<ü>"}) == '{"a": "<ü>"}'


def test_generation_blocks_render_as_their_content():
    assert render("{% generation %}{{ messages[0].content }}{% endgeneration %}") == "Hi"


def test_what_a_template_raises_is_the_message():
    assert refusal("{{ raise_exception('No system role') }}") == "No system role"


def test_special_tokens_that_are_not_set_are_empty():
    assert render("[{{ bos_token }}]") == "[]"


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.append(1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace(x=1) %}{% set ns._x = 1 %}",
        "{{ messages[9].content }}",
        "{{ missing.attribute }}",
        "{{ 1 / 0 }}",
        "{{ 'a' + 1 }}",
        "{{ lipsum(n=100000) }}",
        "{{ self.missing() }}",
        "{{ '\\udfff' }}",
        "{{ dict(**5) }}",
    ],
)
def test_what_a_template_may_not_do_is_refused(source: str):
    assert refusal(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}",
        "{% for a in range(100000) %}{% for b in range(100000) %}xxxxxxxxxxxx{% endfor %}{% endfor %}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 10 ** 9999999 }}",
        "{{ '%9999999999d' % 1 }}",
        "{{ '%9999999999d' | format(1) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a' | center(9999999999) }}",
        "{{ 'a'.ljust(9999999999) }}",
        "{{ range(10**9) | list }}",
        "{{ messages | tojson(indent=99999999) }}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(28) %}{% set ns.x = [ns.x[0] ~ ns.x[0]] %}{% endfor %}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(28) %}{% set ns.x = [ns.x[0] + ns.x[0]] %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x | replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='aa') %}{% for i in range(99) %}{% set ns.x = ns.x.replace('a', 'aa') %}{% endfor %}",
        "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = [ns.x, ns.x] | join %}{% endfor %}",
        "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=2) %}{% for i in range(99999) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for x in [[1]] recursive %}{{ loop([x]) }}{% endfor %}",
    ],
)
def test_a_template_that_does_not_end_or_grows_is_stopped(source: str):
    assert refusal(source)


def test_a_template_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sftcli.modeling.tokenizer.template.MAX_SECONDS", 0.0)
    message = refusal("{% for a in range(100000) %}{{ range(99) | sum }}{% endfor %}")
    assert message == f"the template runs longer than {sandbox.MAX_SECONDS:.0f} seconds"


@pytest.mark.parametrize(
    "source",
    ["{% for %}", "{% break %}", "{% continue %}", "{% macro a(a, a) %}{% endmacro %}", "{% set none = 3 %}", "{{ f(a=1, a=2) }}",
     "{{ " + "(" * 5000 + " }}",],
)  # fmt: skip
def test_what_is_not_jinja_is_refused_at_once(source: str):
    with pytest.raises(DataError, match="the chat template test is not valid Jinja"):
        ChatTemplate(source, name="test").render([], tools=None, add_generation_prompt=False, variables={})


def test_a_content_that_looks_like_a_wide_format_is_only_text():
    template = ChatTemplate("{{ messages[0].content.split('x') | join }}", name="own")
    content = "It costs 5%, as of {2024000 x"
    text = template.render(
        [{"role": "user", "content": content}], tools=None, add_generation_prompt=False, variables={}
    )
    assert text == content.replace("x", "")


LISTS = "{% set ns = namespace(a=['x'], b=['x']) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
TUPLES = LISTS.replace("[", "(").replace("]", ",)")
LONG = "{% set b = 'a\t\n' * 300000 %}"


@pytest.mark.parametrize(
    "source",
    [
        *(
            LISTS + "{{ ns.a | " + name + " }}"
            for name in ("tojson", "string", "pprint", "join", "e", "upper", "sum(start=[])")
        ),
        LISTS + "{{ ns.a }}",
        LISTS + "{{ ns }}",
        LISTS + "{{ {'a': ns.a}.values() }}",
        LISTS + "{{ ns.a ~ 'x' }}",
        LISTS + "{{ 'a%s' % ns.a }}",
        LISTS + "{{ '%s' | format(ns.a) }}",
        LISTS + "{{ 'a{}'.format(ns.a) }}",
        LISTS + "{{ raise_exception(ns.a) }}",
        LISTS + "{% macro m(x) %}{{ x }}{% endmacro %}{{ m(ns.a) }}",
        *(
            LISTS + "{{ ns.a " + sign + " ns.b }}"
            for sign in ("==", "!=", "<", "== ns.b ==", "in [1, ns.b] and 1 in")
        ),
        *(
            LISTS + "{{ " + asked + " }}"
            for asked in ("ns.a is eq(ns.b)", "[ns.a].index(ns.b)", "[ns.a].count(ns.b)")
        ),
        LISTS + "{{ [ns.a] | select('eq', ns.b) | list }}",
        LISTS + "{{ [ns.a] | map('string') | list }}",
        *(LISTS + "{{ [ns.a, ns.b] | " + name + " | length }}" for name in ("sort", "min", "unique")),
        LISTS + "{% for x in [ns.a, ns.b] %}{{ loop.changed(x) }}{% endfor %}",
        *(TUPLES + "{{ " + looked + " }}" for looked in ("{ns.a: 1}", "{}[ns.a]", "{}.get(ns.a)")),
        *(
            LONG + "{{ b | " + name + " }}"
            for name in ("replace('a', b)", "join(b)", "indent(b)", "wordwrap(1, wrapstring=b)")
        ),
        *(
            LONG + "{{ b." + name + " }}"
            for name in ("replace('a', b)", "join(b)", "translate({97: b})", "expandtabs(1000)")
        ),
        LONG + "{{ ('{0}' * 1000).format(b) }}",
        LONG + "{{ ('%(a)s' * 1000) % {'a': b} }}",
        LONG + "{{ [1, 2, 3] | map('string') | join(b) }}{{ b }}",
        *(
            "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, "
            + made
            + "] %}{% endfor %}"
            for made in ("'a' * 900000", "'a' | center(900000)", "messages[0].content.ljust(900000)")
        ),
        LONG
        + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, b[i:]] %}{% endfor %}",
        LONG
        + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set ns.l = [ns.l, b.split()] %}{% endfor %}",
        LONG
        + "{% set ns = namespace(l=[]) %}{% for i in range(9999) %}{% set x %}{{ b }}{% endset %}{% set ns.l = [ns.l, x] %}{% endfor %}",
    ],
)
def test_what_takes_no_room_and_unfolds_without_end_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sandbox, "MAX_NODES", 50_000)
    began = time.process_time()
    message = refusal(source)
    assert "the template" in message
    assert time.process_time() - began < 10


def test_shared_values_of_a_common_size_are_written_and_compared():
    source = (
        "{% set ns = namespace(a=['x']) %}{% for i in range(9) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
        "{{ (ns.a | tojson | length) }} {{ ns.a == ns.a }} {{ {(1, 2): 'pair'}[(1, 2)] }}"
        "{% for m in messages[0:1] %} {{ m.content.replace('i', '--').split('-') | join('+') }}{% endfor %}"
        " {{ 'a\nb' | indent(2) }} {{ '%s-%d' % ('x', 5) }} {{ messages | map(attribute='role') | join(', ') }}"
    )
    assert render(source) == f"{2**9 * 5 + (2**9 - 1) * 4} True pair H++ a\n  b x-5 user"


def test_a_template_of_megabytes_is_refused_by_name():
    with pytest.raises(
        DataError, match="the chat template test has 2000000 characters; the limit is 1000000"
    ):
        ChatTemplate("{{ a }}x" * 250_000, name="test")
