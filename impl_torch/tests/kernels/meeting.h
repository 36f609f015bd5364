// Where threads that share one thread of a CPU wait for each other.

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
