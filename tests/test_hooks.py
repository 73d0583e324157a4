import pytest
from torch import nn

from hf_structprune.hooks import as_output, first_of, others_of, replaced_forwards


def test_modules_run_other_functions_only_while_it_is_open():
    plain, wrapped = nn.Identity(), nn.Identity()
    wrapped.forward = own = lambda x: x + 1  # as Accelerate does where it moves weights
    with pytest.raises(KeyError), replaced_forwards([(plain, lambda x: -x), (wrapped, lambda x: 10 * x)]):
        assert plain(2) == -2 and wrapped(2) == 20
        with replaced_forwards([(plain, lambda x: 0), (plain, lambda x: 7)]):
            assert plain(2) == 7
        assert plain(2) == -2
        raise KeyError
    assert plain(2) == 2 and "forward" not in plain.__dict__
    assert wrapped(2) == 3 and wrapped.__dict__["forward"] is own


@pytest.mark.parametrize("output", [1, (1,), (1, 2, 3), [1], [1, 2]])
def test_an_output_keeps_its_form(output):
    assert first_of(output) == 1
    new = as_output(7, others_of(output))
    assert type(new) is type(output) and first_of(new) == 7
    assert output == 1 or new == type(output)([7, *[None] * (len(output) - 1)])
