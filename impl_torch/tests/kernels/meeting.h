// Where threads that share one thread of a CPU wait for each other, and what is drawn.

static void others();  // lets them run

struct Barrier {
  int arrived = 0, round = 0;
};

static void meet(Barrier& at, int all) {
  const int round = at.round;
  if (++at.arrived == all)
    at.arrived = 0, at.round++;
  else
    while (at.round == round) others();
}

static int drawn(int below) {
  static unsigned state = 1;
  state = state * 1664525u + 1013904223u;
  return int((unsigned long long)state * below >> 32);
}

static bool heads() { return drawn(2); }
