import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info

from mbf_mlx.device.threads import side_by_side


def blas_threads():
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_results_come_in_order_and_the_first_error_is_raised():
    assert side_by_side(lambda number: number * number, range(50)) == [number * number for number in range(50)]
    assert side_by_side(str, []) == []
    with pytest.raises(ZeroDivisionError):
        side_by_side(lambda number: 1 / (number - 3), range(5))


def test_matrices_are_worked_on_in_other_threads_by_a_blas_of_one():
    np.linalg.qr(np.ones((3, 2)))
    before = blas_threads()
    seen = side_by_side(lambda _: (threading.current_thread(), blas_threads()), range(20))
    assert threading.main_thread() not in {thread for thread, _ in seen}
    assert {count for _, counts in seen for count in counts} <= {1}
    assert blas_threads() == before


def test_where_nothing_is_multiplied_blas_is_left_alone():
    np.linalg.qr(np.ones((3, 2)))
    before = blas_threads()
    assert side_by_side(lambda _: blas_threads(), range(4), products=False) == [before] * 4
