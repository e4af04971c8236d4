"""The table of licences, by cases whose answer the licences' own texts or the FSF's list give."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from pipeline.errors import UserError
from pipeline.licences import (
    TERMS,
    alternatives,
    check_licences,
    licence_conflict,
    result_licence,
    unjudged,
    unjudged_sentence,
)
from pipeline.recipe import Recipe

Make = Callable[..., Recipe]


def of(make: Make, teacher: str, text: str = "CC0-1.0", chats: str = "MIT", **changes: Any) -> Recipe:
    return make(
        **{"teacher__licence": teacher, "data__text__licence": text, "data__chats__licence": chats, **changes}
    )


@pytest.mark.parametrize(
    ("teacher", "text", "chats"),
    [
        ("Apache-2.0", "PSF-2.0", "Apache-2.0"),
        ("MIT", "CC-BY-SA-4.0", "CC-BY-4.0"),
        ("Apache-2.0", "CC-BY-SA-4.0", "GPL-3.0-or-later"),  # Creative Commons: SA 4.0 goes into GPLv3
        ("GPL-2.0-or-later", "Apache-2.0", "MIT"),  # as version 3
        ("GPL-3.0-only", "AGPL-3.0-only", "MIT"),
        ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-4.0"),
        ("GPL-2.0-only OR MIT", "Apache-2.0", "MIT"),
        ("Apache-2.0", "CC-BY-ND-4.0 OR CC-BY-4.0", "MIT"),
        ("GPL-2.0-only WITH Classpath-exception-2.0", "MIT", "MIT"),
        ("LicenseRef-mine", "unknown", "my own words"),
        ("apache-2.0", "mit", "cc0-1.0"),
        ("llama2", "MIT", "MIT"),
    ],
)
def test_what_goes_together(make_recipe: Make, teacher: str, text: str, chats: str) -> None:
    assert licence_conflict(of(make_recipe, teacher, text, chats)) is None


@pytest.mark.parametrize(
    ("teacher", "text", "chats", "in_sentence"),
    [
        ("CC-BY-ND-4.0", "MIT", "MIT", "teacher.licence: CC-BY-ND-4.0 forbids changed versions"),
        ("MIT", "CC-BY-NC-ND-4.0", "MIT", "data.text.licence: CC-BY-NC-ND-4.0 forbids changed versions"),
        ("GPL-2.0-only", "GPL-3.0-only", "MIT", "teacher.licence (GPL-2.0-only) and data.text.licence"),
        ("GPL-2.0-only", "MIT", "Apache-2.0", "data.chats.licence (Apache-2.0)"),
        ("CC-BY-NC-4.0", "CC-BY-SA-4.0", "MIT", "no licence satisfies teacher.licence (CC-BY-NC-4.0)"),
        ("CC-BY-NC-SA-4.0", "MIT", "GPL-3.0-only", "data.chats.licence (GPL-3.0-only)"),
        ("CC-BY-SA-4.0 AND CC-BY-NC-4.0", "MIT", "MIT", "no licence satisfies"),
        ("llama3.1", "MIT", "MIT", "begin with 'Llama'; name is 'Tiny'"),
    ],
)
def test_what_excludes_each_other(
    make_recipe: Make, teacher: str, text: str, chats: str, in_sentence: str
) -> None:
    recipe = of(make_recipe, teacher, text, chats)
    with pytest.raises(UserError) as refused:
        check_licences(recipe)
    assert in_sentence in str(refused.value)
    assert "accept_licence_conflict" in str(refused.value)
    check_licences(of(make_recipe, teacher, text, chats, accept_licence_conflict="for study only"))


def test_a_teacher_that_may_train_only_its_own_versions(make_recipe: Make) -> None:
    pruned = of(make_recipe, "llama2")
    assert licence_conflict(pruned) is None
    other = of(make_recipe, "llama2", student={"model": "someone/other"})
    assert "forbids training other models" in str(licence_conflict(other))
    assert licence_conflict(of(make_recipe, "llama3.1", name="Llama-Tiny")) is None


def test_expressions() -> None:
    assert alternatives("MIT OR (Apache-2.0 AND CC-BY-4.0)") == [
        frozenset({"MIT"}),
        frozenset({"Apache-2.0", "CC-BY-4.0"}),
    ]
    assert alternatives("") == [frozenset({""})]
    assert alternatives("(MIT") == [frozenset({"(MIT"})]


def test_the_table_names_licences_of_the_spdx_list_or_of_models() -> None:
    import license_expression

    known = {symbol.key for symbol in license_expression.get_spdx_licensing().known_symbols.values()}
    assert {name for name in TERMS if name not in known and not name.startswith("llama")} == set()
    results = {name for terms in TERMS.values() for name in terms.result or ()}
    assert results <= set(TERMS)


def test_what_the_table_does_not_know_is_said(make_recipe: Make) -> None:
    assert unjudged(of(make_recipe, "MIT", "unknown", "MIT OR LicenseRef-x")) == [
        "data.text.licence: unknown"
    ]


def test_a_given_student_is_judged_and_one_cut_from_the_teacher_is_not(make_recipe: Make) -> None:
    given = {"model": "someone/student", "licence": "CC-BY-ND-4.0"}
    recipe = of(make_recipe, "MIT", student=given)
    assert "student.licence: CC-BY-ND-4.0 forbids changed versions" in str(licence_conflict(recipe))
    assert licence_conflict(of(make_recipe, "MIT", student__licence="CC-BY-ND-4.0")) is None
    both = of(make_recipe, "GPL-2.0-only", student={"model": "someone/student", "licence": "Apache-2.0"})
    assert "student.licence (Apache-2.0)" in str(licence_conflict(both))
    named = of(make_recipe, "MIT", student={"model": "someone/student", "licence": "llama3.2"})
    assert "student.licence: llama3.2 asks that the result's name begin" in str(licence_conflict(named))
    assert unjudged(of(make_recipe, "MIT", student={"model": "someone/student"})) == [
        "student.licence: unknown"
    ]
    assert unjudged(of(make_recipe, "MIT")) == []


@pytest.mark.parametrize(
    ("teacher", "text", "chats", "expected"),
    [
        ("Apache-2.0", "PSF-2.0", "Apache-2.0", "Apache-2.0"),
        ("apache-2.0", "unknown", "my own words", "Apache-2.0"),
        ("llama3.2", "CC-BY-4.0", "MIT", "llama3.2"),
        ("LicenseRef-mine", "MIT", "MIT", "LicenseRef-mine"),
        ("unknown", "MIT", "MIT", "unknown"),
        # Share-alike data; Creative Commons names GPLv3 alone as compatible with SA 4.0.
        ("MIT", "CC-BY-SA-4.0", "CC-BY-4.0", "CC-BY-SA-4.0"),
        ("Apache-2.0", "CC-BY-SA-4.0", "GPL-3.0-or-later", "GPL-3.0-only"),
        ("unknown", "CC-BY-SA-4.0", "MIT", "unknown"),
        ("CC-BY-NC-4.0", "CC-BY-NC-SA-4.0", "CC-BY-4.0", "CC-BY-NC-SA-4.0"),
        # "Or later" stays as long as nobody asks for less; Apache goes with version 3 only.
        ("GPL-2.0-or-later", "MIT", "MIT", "GPL-2.0-or-later"),
        ("GPL-2.0-or-later", "Apache-2.0", "MIT", "GPL-3.0-only"),
        ("GPL-3.0-or-later", "GPL-3.0-only", "MIT", "GPL-3.0-only"),
        ("GPL-3.0-only", "GPL-3.0-or-later", "MIT", "GPL-3.0-only"),
        ("GPL-3.0-only", "AGPL-3.0-only", "MIT", "AGPL-3.0-only"),
        ("LGPL-3.0-only", "MIT", "MIT", "LGPL-3.0-only"),
        # Who may choose passes the choice on, unless somebody excludes a part of it.
        ("MIT OR Apache-2.0", "MIT", "MIT", "MIT OR Apache-2.0"),
        ("MIT AND CC-BY-4.0", "MIT", "MIT", "MIT AND CC-BY-4.0"),
        ("GPL-2.0-only OR MIT", "MIT", "MIT", "GPL-2.0-only OR MIT"),
        ("GPL-2.0-only OR MIT", "Apache-2.0", "MIT", "MIT"),
        ("Apache-2.0", "GPL-3.0-only OR CC-BY-4.0", "MIT", "Apache-2.0"),
        ("CC-BY-SA-4.0 AND MIT", "MIT", "MIT", "CC-BY-SA-4.0"),
        ("", "MIT", "MIT", "unknown"),
    ],
)
def test_what_the_result_goes_out_under(
    make_recipe: Make, teacher: str, text: str, chats: str, expected: str
) -> None:
    recipe = of(make_recipe, teacher, text, chats)
    assert licence_conflict(recipe) is None or teacher.startswith("llama")
    assert result_licence(recipe) == expected


@pytest.mark.parametrize(
    ("teacher", "student", "text", "expected"),
    [
        ("MIT", "Apache-2.0", "MIT", "Apache-2.0"),  # the weights are a version of the student's
        ("MIT", "llama3.2", "MIT", "llama3.2"),
        ("GPL-3.0-only", "MIT", "MIT", "GPL-3.0-only"),
        ("Apache-2.0", "MIT", "CC-BY-SA-4.0", "CC-BY-SA-4.0"),
        ("Tongyi Qianwen", "Apache-2.0", "ODC-By-1.0", "Tongyi Qianwen"),  # what asks for what is not known
        ("Apache-2.0", "unknown", "MIT", "unknown"),
        ("LicenseRef-one", "LicenseRef-other", "MIT", "unknown"),
        ("LicenseRef-one", "MIT", "CC-BY-SA-4.0", "unknown"),
    ],
)
def test_what_a_given_student_goes_out_under(
    make_recipe: Make, teacher: str, student: str, text: str, expected: str
) -> None:
    given = {"model": "someone/student", "licence": student}
    assert result_licence(of(make_recipe, teacher, text, student=given)) == expected
    # Of a student that is cut from the teacher nobody asks.
    assert result_licence(of(make_recipe, "MIT", "MIT", student__licence=student)) == "MIT"


def test_there_is_a_result_wherever_no_licence_excludes_another(make_recipe: Make) -> None:
    for teacher, text in product(TERMS, TERMS):
        recipe = of(make_recipe, teacher, text, name="Llama-Tiny")
        assert (result_licence(recipe) == "unknown") == (licence_conflict(recipe) is not None), recipe


def test_no_licence_is_named_where_a_conflict_was_accepted(make_recipe: Make) -> None:
    accepted = {"accept_licence_conflict": "for study only"}
    assert result_licence(of(make_recipe, "CC-BY-ND-4.0", **accepted)) == "unknown"
    assert result_licence(of(make_recipe, "GPL-2.0-only", "Apache-2.0", **accepted)) == "unknown"
    # A name that does not begin as the licence asks makes it no other licence.
    assert result_licence(of(make_recipe, "llama3.1", **accepted)) == "llama3.1"


def test_what_is_not_judged_is_one_printable_line() -> None:
    sentence = unjudged_sentence(["teacher.licence: a\nb", "data.text.licence: unknown"])
    assert sentence.isprintable()
    assert "teacher.licence: a\\nb; data.text.licence: unknown" in sentence
