// The team of threads inside one node of a graph: every part runs once, whoever comes, and whatever a part wrote is there after the call.
// scripts/test-preset tsan runs this under the thread sanitizer.
#include "turboquant/ggml/node_team.h"

#include <gtest/gtest.h>

#include <chrono>
#include <numeric>
#include <thread>
#include <vector>

namespace turboquant::ggml {
namespace {

/// The leader's work: `calls` calls of `parts` parts, each of which adds to a plain number of its own. Wrong sums, or a race: parts were
/// lost, ran twice, or ran on after their call.
std::vector<int> add_up(NodeTeam& team, int calls, int parts) {
    std::vector<int> sums(static_cast<std::size_t>(parts));
    for (int call = 0; call < calls; call++) {
        team.run(parts, [&](int part) { sums[static_cast<std::size_t>(part)] += call; });
        // What the parts wrote is read between the calls, as the leader of an operation does.
        if (std::accumulate(sums.begin(), sums.end(), 0) != parts * (call * (call + 1) / 2)) return {};
    }
    return sums;
}

TEST(NodeTeam, EveryPartRunsOnceAndIsSeen) {
    for (const int threads : {1, 2, 4})
        for (const int parts : {1, 2, 3, 17}) {
            NodeTeam team;
            std::vector<std::thread> others;
            for (int i = 1; i < threads; i++) others.emplace_back([&] { team.follow(); });
            team.lead(threads);
            const std::vector<int> sums = add_up(team, 100, parts);
            team.finish();
            for (std::thread& t : others) t.join();
            EXPECT_EQ(sums, std::vector<int>(static_cast<std::size_t>(parts), 4950)) << threads << " threads, " << parts << " parts";
        }
}

TEST(NodeTeam, ThreadsThatComeLateOrNeverHoldNobodyUp) {
    NodeTeam team;
    team.lead(3);
    EXPECT_EQ(add_up(team, 50, 8), std::vector<int>(8, 1225)) << "alone";
    std::thread late([&] { team.follow(); });
    EXPECT_EQ(add_up(team, 50, 8), std::vector<int>(8, 1225));
    team.finish();
    late.join();
    team.follow();  // after the end: returns at once
}

TEST(NodeTeam, OthersTakeParts) {
    if (std::thread::hardware_concurrency() < 2) GTEST_SKIP() << "needs two processors";
    NodeTeam team;
    std::thread other([&] { team.follow(); });
    team.lead(2);
    // Parts that wait for each other: only two threads get through.
    std::atomic<int> here{0};
    bool met = true;
    team.run(2, [&](int) {
        here++;
        const auto give_up = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        while (here < 2)
            if (std::chrono::steady_clock::now() > give_up) {
                here = 2, met = false;
                break;
            }
    });
    team.finish();
    other.join();
    EXPECT_TRUE(met) << "one thread ran all parts";
}

}  // namespace
}  // namespace turboquant::ggml
