"""The index of each row's teacher, from a name, a function or an index of its own."""

import pickle

import pytest

from gkd_trainer.data import TeacherRoute
from gkd_trainer.errors import GKDDataError

ROUTE = TeacherRoute(("math", "code"))


def by_length(row):
    return "code" if len(row["text"]) > 3 else "math"


def test_a_name_in_the_column_becomes_its_place():
    assert [ROUTE.index_of({"teacher": name}) for name in ("code", "math")] == [1, 0]
    assert TeacherRoute(("math", "code"), "domain").index_of({"domain": "code", "teacher": "physics"}) == 1


def test_a_function_decides_whatever_the_column_holds():
    route = TeacherRoute(("math", "code"), function=by_length)
    assert route.index_of({"text": "long text", "teacher": "math"}) == 1
    assert pickle.loads(pickle.dumps(route)) == route


def test_without_the_column_an_index_of_the_row_s_own_counts():
    assert ROUTE.index_of({"teacher_index": 1}) == 1
    for index in (-1, 2):
        with pytest.raises(GKDDataError, match=rf"from 0 to 1; got {index}"):
            ROUTE.index_of({"teacher_index": index})


@pytest.mark.parametrize("name", ["physics", "", None, 1, ["math"]])
def test_anything_but_a_known_name_is_refused(name):
    with pytest.raises(GKDDataError, match=r"one of the teachers 'math', 'code' for each row; the column 'teacher' h"):
        ROUTE.index_of({"teacher": name})
    with pytest.raises(GKDDataError, match="`route` returned"):
        TeacherRoute(("math", "code"), function=lambda row: name).index_of({})


def test_a_missing_column_is_refused_with_the_columns_that_there_are():
    with pytest.raises(GKDDataError, match=r"a column 'teacher' .* got the columns \['messages'\]: add it"):
        ROUTE.index_of({"messages": []})
