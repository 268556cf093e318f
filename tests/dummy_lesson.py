# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 99 · A lesson for the tests
# ## Question
# How long is a piece of string?

# %%
from clawdemy_infer.lesson import Lesson

lesson = Lesson("99 dummy", machine="a test's machine")
2 + 2

# %% tags=["nbval-ignore-output"]
lesson.predict("piece of string", napkin=1.0, predicted=1.2, unit="s")
lesson.measure("piece of string", 1.5)
lesson.table()

# %% tags=["widget", "nbval-ignore-output"]
from ipywidgets import IntSlider

IntSlider()

# %%
import matplotlib.pyplot as plt

plt.figure(figsize=(1, 1))
plt.plot([1, 2])
plt.show()

# %% tags=["exercise", "exercise:double"]
def double(x):
    return ...


lesson.exercise("double", double, cases={2: 4, 3.5: 7.0}, nudge="Add it to itself.",
                means="Two of a kind.")

# %% [markdown] tags=["hint"]
# <details><summary>Hint</summary>
#
# Add it to itself.
#
# </details>

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# def double(x):
#     return x + x
# ```
#
# </details>

# %% tags=["exercise", "exercise:thrice"]
thrice = ...
lesson.exercise("thrice", thrice, expected=9)

# %% [markdown] tags=["solution"]
# <details><summary>Solution</summary>
#
# ```python
# thrice = 3 * 3
# ```
#
# </details>
