"""Which licences of teacher, student and data can go into one model, and which the model then has.

A small table and a plain reading of each licence's own conditions; no legal advice. Whether a licence of data
reaches weights that were trained on it is an open question in law: martlet takes the careful side, as if it
did. Licences that are not in the table are not judged.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from export.errors import one_line
from pipeline.errors import UserError
from pipeline.recipe import Recipe

NON_COMMERCIAL = frozenset({"CC-BY-NC-4.0", "CC-BY-NC-SA-4.0"})


@dataclass(frozen=True)
class Terms:
    """What a licence asks of something made with it.

    Attributes:
        result: the licences that the result may have; None: any.
        derivatives: changed versions may be given away.
        other_models: it, or what it says, may train a model that is no version of it.
        name_prefix: with what the result's name must begin.
    """

    result: frozenset[str] | None = None
    derivatives: bool = True
    other_models: bool = True
    name_prefix: str = ""


ANY = Terms()
GPL_2, GPL_3, AGPL_3 = "GPL-2.0-only", "GPL-3.0-only", "AGPL-3.0-only"
TERMS: dict[str, Terms] = {
    **dict.fromkeys(
        (
            *("MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "0BSD", "ISC", "Zlib", "Unlicense", "WTFPL"),
            *("CC0-1.0", "PDDL-1.0", "CC-BY-3.0", "CC-BY-4.0", "ODC-By-1.0", "CDLA-Permissive-1.0"),
            *("CDLA-Permissive-2.0", "PSF-2.0", "Python-2.0", "PostgreSQL", "BSL-1.0", "MPL-2.0"),
            # A database under the ODbL is no licence of what is produced with it.
            "ODbL-1.0",
        ),
        ANY,
    ),
    "Apache-2.0": ANY,
    "CC-BY-SA-3.0": Terms(frozenset({"CC-BY-SA-3.0", "CC-BY-SA-4.0", GPL_3})),
    "CC-BY-SA-4.0": Terms(frozenset({"CC-BY-SA-4.0", GPL_3})),
    "GFDL-1.3-only": Terms(frozenset({"GFDL-1.3-only"})),
    "GFDL-1.3-or-later": Terms(frozenset({"GFDL-1.3-only"})),
    "GPL-2.0-only": Terms(frozenset({GPL_2})),
    "GPL-2.0-or-later": Terms(frozenset({GPL_2, GPL_3, AGPL_3})),
    "GPL-3.0-only": Terms(frozenset({GPL_3, AGPL_3})),
    "GPL-3.0-or-later": Terms(frozenset({GPL_3, AGPL_3})),
    "LGPL-2.1-only": Terms(frozenset({GPL_2, GPL_3, AGPL_3})),
    "LGPL-2.1-or-later": Terms(frozenset({GPL_2, GPL_3, AGPL_3})),
    "LGPL-3.0-only": Terms(frozenset({GPL_3, AGPL_3})),
    "LGPL-3.0-or-later": Terms(frozenset({GPL_3, AGPL_3})),
    "AGPL-3.0-only": Terms(frozenset({AGPL_3})),
    "AGPL-3.0-or-later": Terms(frozenset({AGPL_3})),
    "CC-BY-NC-4.0": Terms(NON_COMMERCIAL),
    "CC-BY-NC-3.0": Terms(NON_COMMERCIAL),
    "CC-BY-NC-SA-4.0": Terms(frozenset({"CC-BY-NC-SA-4.0"})),
    "CC-BY-ND-4.0": Terms(derivatives=False),
    "CC-BY-ND-3.0": Terms(derivatives=False),
    "CC-BY-NC-ND-4.0": Terms(derivatives=False),
    "CC-BY-NC-ND-3.0": Terms(derivatives=False),
    # Licences of models, by their names on the hub.
    "llama2": Terms(other_models=False),
    "llama3": Terms(other_models=False, name_prefix="Llama"),
    "llama3.1": Terms(name_prefix="Llama"),
    "llama3.2": Terms(name_prefix="Llama"),
    "llama3.3": Terms(name_prefix="Llama"),
}
EXCLUDES = {
    "Apache-2.0": frozenset({GPL_2, "GPL-2.0-or-later", "LGPL-2.1-only", "LGPL-2.1-or-later"}),
}
"""Licences that the result cannot have, though the licence asks for none: Apache's clauses on patents are
further restrictions in the sense of the GPL's version 2."""
UNKNOWN = "unknown"
"""What a licence is called that nobody named."""
MODELS = ("student.licence", "teacher.licence")

_BY_LOWER_CASE = {name.lower(): name for name in TERMS}


def licences_of(recipe: Recipe) -> dict[str, str]:
    """The licence of everything that a model of this recipe is made from, by key, the model first whose
    changed version it is."""
    models = {"teacher.licence": recipe.teacher.licence}
    if recipe.student.model is not None:
        models = {"student.licence": recipe.student.licence, **models}
    return {
        **models,
        "data.text.licence": recipe.data.text.licence,
        "data.chats.licence": recipe.data.chats.licence,
    }


def licence_conflict(recipe: Recipe) -> str | None:
    """What forbids giving away a model of this recipe, in one sentence that names key and licences; None
    where nothing in the table does."""
    parts = licences_of(recipe)
    choices = [[(key, one) for one in alternatives(licence)] for key, licence in parts.items()]
    conflicts = []
    for choice in product(*choices):
        conflict = _conflict(dict(choice), recipe)
        if conflict is None:
            return None
        conflicts.append(conflict)
    return conflicts[0]


def alternatives(licence: str) -> list[frozenset[str]]:
    """What an SPDX expression lets one choose from: each choice is the set of licences that then apply.

    ``MIT OR (Apache-2.0 AND CC-BY-4.0)`` gives {MIT} and {Apache-2.0, CC-BY-4.0}. What is no SPDX expression
    is one licence of that name.
    """
    if re.fullmatch(r"[\w.+-]*", licence):
        return [frozenset({_known(licence)})]
    # Takes a while to load, and most recipes name single licences.
    import license_expression

    spdx = license_expression.get_spdx_licensing()
    try:
        parsed = spdx.parse(licence)
    except license_expression.ExpressionError:
        return [frozenset({_known(licence)})]

    def choices(node: Any) -> list[frozenset[str]]:
        if isinstance(node, license_expression.LicenseWithExceptionSymbol):
            return [frozenset({_known(node.license_symbol.key)})]
        if isinstance(node, license_expression.LicenseSymbol):
            return [frozenset({_known(node.key)})]
        arguments = [choices(argument) for argument in node.args]
        if isinstance(node, spdx.OR):
            return [choice for argument in arguments for choice in argument]
        return [frozenset().union(*choice) for choice in product(*arguments)]

    return [frozenset({_known(licence)})] if parsed is None else choices(parsed)


def unjudged(recipe: Recipe) -> list[str]:
    """``key: licence`` of those that the table does not know."""
    return [
        f"{key}: {licence}"
        for key, licence in licences_of(recipe).items()
        if not any(all(name in TERMS for name in choice) for choice in alternatives(licence))
    ]


def unjudged_sentence(entries: Sequence[str]) -> str:
    """One sentence about what ``unjudged`` returns, for whoever decides about giving the model away."""
    return one_line(
        f"martlet's table of licences does not know {'; '.join(entries)}, so nothing was judged of them; "
        "read them before you give the model away."
    )


def result_licence(recipe: Recipe) -> str:
    """The licence that a model of this recipe goes out under.

    That of the model whose changed version it is (the given student, else the teacher), unless another part's
    conditions let the result have only theirs. A licence of one of the two models that the table does not
    know lets the result have no other.

    Returns:
        An SPDX expression, or a licence's name as the recipe has it; ``unknown`` where no licence satisfies
        all parts, as far as the table knows.
    """
    parts = licences_of(recipe)
    choices = [[(key, one) for one in alternatives(licence)] for key, licence in parts.items()]
    models = [_known(licence) for key, licence in parts.items() if key in MODELS]
    singly = [name for choice in choices for _, names in choice for name in sorted(names)]
    for wanted in dict.fromkeys([*models, *singly, *TERMS]):
        results = frozenset().union(*alternatives(wanted))
        for choice in product(*choices):
            asking = [(key, name) for key, names in choice for name in names]
            if all(_permits(key, name, result) for key, name in asking for result in results):
                return wanted or UNKNOWN
    return UNKNOWN


def check_licences(recipe: Recipe) -> None:
    """Refuses a recipe whose licences exclude each other, unless ``accept_licence_conflict`` is given.

    Raises:
        UserError: they do.
    """
    conflict = licence_conflict(recipe)
    if conflict is not None and not recipe.accept_licence_conflict:
        raise UserError(
            f"{conflict}; choose other sources, or say in accept_licence_conflict why it may be done (the "
            "model cards will show it)."
        )


def _conflict(parts: Mapping[str, frozenset[str]], recipe: Recipe) -> str | None:
    each = [(key, name) for key, names in parts.items() for name in sorted(names)]
    allowed: frozenset[str] | None = None
    asking: list[tuple[str, str]] = []
    for key, name in each:
        terms = TERMS.get(name, ANY)
        if not terms.derivatives:
            return f"{key}: {name} forbids changed versions, which a model made from it would be"
        if not terms.other_models and key == "teacher.licence" and recipe.student.model is not None:
            return f"{key}: {name} forbids training other models with it, and student.model names another"
        if terms.name_prefix and not recipe.name.startswith(terms.name_prefix):
            return (
                f"{key}: {name} asks that the result's name begin with {terms.name_prefix!r}; "
                f"name is {recipe.name!r}"
            )
        if terms.result is not None:
            allowed = terms.result if allowed is None else allowed & terms.result
            asking.append((key, name))
    if allowed is None:
        return None
    left = allowed
    for key, name in each:
        if name in EXCLUDES and left & EXCLUDES[name]:
            left -= EXCLUDES[name]
            asking.append((key, name))
    if left:
        return None
    return "no licence satisfies " + " and ".join(f"{key} ({name})" for key, name in asking)


def _permits(key: str, name: str, result: str) -> bool:
    """Whether a licence lets something made with what it covers have another licence."""
    if name not in TERMS:
        return result == name or key not in MODELS
    terms = TERMS[name]
    if not terms.derivatives or result in EXCLUDES.get(name, ()):
        return False
    return terms.result is None or result == name or result in terms.result


def _known(name: str) -> str:
    return _BY_LOWER_CASE.get(name.strip().lower(), name.strip())
