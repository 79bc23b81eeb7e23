def test_x(benchmark): benchmark(lambda: 1)
