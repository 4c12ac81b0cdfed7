"""The reader of compiled programs, on programs whose counts are known."""

import hlo
import pytest

TEXT = """HloModule jit_step, is_scheduled=true

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%forward (p: f32[8,4]) -> f32[4,4] {
  %p = f32[8,4]{1,0:T(8,128)} parameter(0)
  ROOT %dot.1 = f32[4,4]{1,0} convolution(%p, %p), dim_labels=bf_io->bf, \
metadata={op_name="jit(step)/ascent/jvp(net)/dot_general"}
}

%again (q: f32[4,4]) -> f32[4,4] {
  %q = f32[4,4]{1,0} parameter(0)
  ROOT %dot.2 = f32[4,4]{1,0} dot(%q, %q), \
metadata={op_name="jit(step)/descent/jvp(net)/dot_general"}
}

%start (r: f32[2,4]) -> (f32[2,4], f32[4,4]) {
  %r = f32[2,4]{1,0} parameter(0)
  %gather.1 = f32[4,4]{1,0} all-gather(%r), channel_id=9, dimensions={0}
  ROOT %both = (f32[2,4], f32[4,4]) tuple(%r, %gather.1)
}

%finish (s: f32[2,4]) -> f32[4,4] {
  %s = f32[2,4]{1,0} parameter(0)
  ROOT %gather.2 = f32[4,4]{1,0} all-gather(%s), channel_id=9, dimensions={0}
}

%body (state: f32[3]) -> f32[3] {
  %state = f32[3]{0} parameter(0)
  ROOT %in.loop = f32[3]{0} all-reduce(%state), channel_id=1, to_apply=%add
}

%more (state.1: f32[3]) -> pred[] {
  %state.1 = f32[3]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY %main (a: f32[8,4], b: f32[3], c: f32[2,4]) -> f32[4,4] {
  %a = f32[8,4]{1,0} parameter(0)
  %b = f32[3]{0} parameter(1)
  %c = f32[2,4]{1,0} parameter(2)
  %loop = f32[3]{0} while(%b), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %first = f32[4,4]{1,0} fusion(%a), kind=kOutput, calls=%forward
  %within = f32[4,4]{1,0} all-reduce(%first), channel_id=1, to_apply=%add
  %first.2 = f32[4,4]{1,0} convolution(%within, %first), \
metadata={op_name="jit(step)/ascent/transpose(net)/dot_general"}
  %crossing = (f32[4,4]{1,0}, /*index=1*/f32[]) all-reduce(%first.2, %zero), \
channel_id=1, to_apply=%add, metadata={op_name="jit(step)/ascent/psum"}
  %crossed = f32[4,4]{1,0} get-tuple-element(%crossing), index=0
  %zero = f32[] constant(0)
  %second = f32[4,4]{1,0} fusion(%crossed), kind=kOutput, calls=%again
  %early = (f32[2,4], f32[4,4]) fusion(%c), kind=kCustom, calls=%start
  %late = f32[4,4]{1,0} fusion(%c), kind=kCustom, calls=%finish
  %permuting = (f32[2,4]{1,0}, f32[2,4]{1,0}, u32[], u32[]) \
collective-permute-start(%c), channel_id=4
  %permuted = f32[2,4]{1,0} collective-permute-done(%permuting)
  ROOT %last = f32[4,4]{1,0} all-reduce(%second), channel_id=1, to_apply=%add
}
"""


def test_every_collective_is_found_once_with_its_loops():
  found = [(c.kind, c.shapes, c.count, c.words) for c in hlo.collectives(TEXT)]
  assert sorted(found) == [
    ("all-gather", ((4, 4),), 1, 16),  # Two fusions of one channel.
    ("all-reduce", ((3,),), 5, 15),  # The loop runs it five times.
    ("all-reduce", ((4, 4),), 1, 16),
    ("all-reduce", ((4, 4),), 1, 16),
    ("all-reduce", ((4, 4), ()), 1, 17),
    ("collective-permute", ((2, 4),), 1, 8),
  ]


def test_only_what_the_second_pass_waits_for_is_between():
  # Not the one inside the first pass, whose product needs it, nor the last.
  (between,) = [c for c in hlo.collectives(TEXT) if c.is_between]
  assert between.shapes == ((4, 4), ())


def test_a_text_that_is_no_program_is_refused():
  with pytest.raises(ValueError, match="must be a compiled program"):
    hlo.collectives("nothing")


TRAFFIC = """HloModule jit_step, is_scheduled=true

%square (p: f32[4,4]) -> f32[4,4] {
  %p = f32[4,4]{1,0} parameter(0)
  ROOT %squared = f32[4,4]{1,0} multiply(%p, %p)
}

%nothing (q: f32[4,4]) -> f32[4,4] {
  ROOT %q = f32[4,4]{1,0} parameter(0)
}

%more (s: f32[2]) -> pred[] {
  %s = f32[2]{0} parameter(0)
  ROOT %yes = pred[] constant(true)
}

%body (t: f32[2]) -> f32[2] {
  %t = f32[2]{0} parameter(0)
  ROOT %twice = f32[2]{0} add(%t, %t)
}

ENTRY %main (a: f32[8,4], b: f32[4,4], c: f32[2], d: pred[]) -> f32[4,4] {
  %a = f32[8,4]{1,0:T(8,128)} parameter(0)
  %b = f32[4,4]{1,0} parameter(1)
  %c = f32[2]{0} parameter(2)
  %d = pred[] parameter(3)
  %start = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0}, u32[]) copy-start(%a)
  %near = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%start)
  %slicing = ((f32[8,4]{1,0}), bf16[2,4]{1,0:S(1)}, s32[]) slice-start(%a)
  %slice = bf16[2,4]{1,0:T(8,128)S(1)} slice-done(%slicing)
  %sum = f32[4,4]{1,0} fusion(%near, %b), kind=kLoop, calls=%square
  %loop = f32[2]{0} while(%c), condition=%more, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %last = f32[4,4]{1,0} conditional(%d, %sum, %b), \
true_computation=%square, false_computation=%nothing
}
"""


def test_main_memory_counts_a_copy_to_fast_memory_once():
  copied, sliced = 8 * 4 * 4, 2 * 4 * 2  # Read; written to fast memory.
  fused = 2 * 4 * 4 * 4  # b and the result; the copy is near.
  loop = 5 * (3 * 2 * 4)
  branch = 3 * 4 * 4 * 4
  total = copied + sliced + fused + loop + branch
  assert hlo.main_memory_bytes(TRAFFIC) == total
