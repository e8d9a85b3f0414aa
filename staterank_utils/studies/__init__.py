"""Studies: functions that take a model and sizes, measure one finding, and return numbers that can be stored.

`texts` draws what is read, `groups` measures ranks and what predicts them, `removal` the loss without some heads, `recall` what is
copied from context and what is left of it when half-lives are capped, and `ladder` all of it for one model, with the claims judged.
"""
